"""Which cases are timed first: time may be up before the last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rondo.kernels.bench.cases import LONGEST
from rondo.kernels.bench.peers import PEERS

Shape = tuple[int, int]
LIKE_OURS = ("torch", "chunked", "loop")
"""Peers made of torch's operators."""
SHAPES: tuple[Shape, ...] = ((8, 8192), (32, 2048), (1, 131072), (2, 32768))
"""Batch and time, the most telling first."""


class Key(NamedTuple):
    """What is timed, ours and peers one after another."""

    operator: str
    preset: str
    batch: int
    length: int


def shared(operator: str) -> bool:
    """Whether others have kernels for it, which ours are to be measured against."""
    return any(peer not in LIKE_OURS for peer in PEERS[operator])


def ordered(
    operators: Sequence[str], presets: Sequence[str], shapes: Sequence[Shape] = SHAPES
) -> list[Key]:
    """All cases: shared operators at the first shape and preset, one case of each other, shared
    ones at the other presets, then shape after shape, and the rest of the others."""

    def rounds() -> Iterator[tuple[tuple[int, int, int], Key]]:
        for operator in operators:
            fitting = [s for s in shapes if s[1] <= LONGEST.get(operator, s[1])]
            for i, shape in enumerate(fitting):
                for j, preset in enumerate(presets):
                    if i == j == 0:
                        turn = (0 if shared(operator) else 1, 0, 0)
                    else:
                        turn = (2 if shared(operator) else 3, i, j)
                    yield turn, Key(operator, preset, *shape)

    return [key for _, key in sorted(rounds(), key=lambda each: each[0])]
