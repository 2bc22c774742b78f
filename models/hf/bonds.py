"""How tensors of two models of the same shape stand for each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from rondo.errors import UserError


def _first(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]


class Bond(NamedTuple):
    """One of their tensors, and those of ours that it is made of."""

    theirs: str
    ours: tuple[str, ...]
    pack: Callable[[Sequence[Tensor]], Tensor] = _first
    unpack: Callable[[Tensor], Sequence[Tensor]] = _alone


def same(theirs: str, ours: str) -> Bond:
    """A tensor that is the same on both sides."""
    return Bond(theirs, (ours,))


def to_theirs(bonds: Iterable[Bond], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from all of ours. Raises UserError where one of ours is missing or left."""
    left, found = set(ours), {}
    for bond in bonds:
        if missing := [name for name in bond.ours if name not in ours]:
            raise UserError(f"{missing[0]} is missing, of which {bond.theirs} is made")
        found[bond.theirs] = bond.pack([ours[name] for name in bond.ours]).contiguous()
        left.difference_update(bond.ours)
    if left:
        raise UserError(f"there is no place for {_names(left)}")
    return found


def to_ours(bonds: Sequence[Bond], theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our tensors by name, float32, from all of theirs, of which it takes one at a time. Raises
    UserError, before the first, where one of theirs is missing or left."""
    names = [bond.theirs for bond in bonds]
    if missing := [name for name in names if name not in theirs]:
        raise UserError(f"{missing[0]} is missing")
    if left := set(theirs).difference(names):
        raise UserError(f"there is no place for {_names(left)}")
    return _unpacked(bonds, theirs)


def _unpacked(bonds: Iterable[Bond], theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for bond in bonds:
        parts = bond.unpack(theirs[bond.theirs])
        yield from zip(bond.ours, (part.float().contiguous() for part in parts), strict=True)


def _names(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
