"""Which samples of a stage are replayed, and which ones these are.

`Share` spreads replayed samples evenly: of the first n samples of a stage `round(n rho)` are, so in
any prefix their number is within 1/2 of rho n, and in any batch within 1 of its share. `Pool` is
what they are taken from: what a run has seen, in its order, `offset` samples on, or shuffled.
`Pools` takes turns between several, each with a share of its own, as a mixture does: of two, each
is within 1 of its share in any prefix.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

from rondo.pretrain.data.dataset import Sample, TokenDataset
from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.mixture import Mixture
from rondo.pretrain.recipe import ReplayConfig

_ROUNDS = 6


class Share:
    """A share of the integers from 0 upward, evenly spread, in exact arithmetic."""

    def __init__(self, share: float | list[float]) -> None:
        """`share` (of a list: its sum) is from 0 to 1, and is taken as the decimal number that it
        is written as."""
        shares = share if isinstance(share, list) else [share]
        self._exact = sum((Fraction(repr(float(each))) for each in shares), Fraction(0))
        if not 0 <= self._exact <= 1:
            raise DataError(f"replay.share is {share}; expected 0 to 1")

    def __bool__(self) -> bool:
        """Whether it is more than 0."""
        return self._exact > 0

    def before(self, index: int) -> int:
        """How many numbers below `index` are of the share."""
        whole = self._exact.denominator
        return (2 * index * self._exact.numerator + whole) // (2 * whole)

    def holds(self, index: int) -> bool:
        """Whether `index` is of the share."""
        return self.before(index + 1) > self.before(index)


class Pool:
    """Samples that were seen before, each of which can be replayed once.

    Args:
        parts: datasets, and how many samples of each, from its first on, were seen.
        shuffled: take them in an order of `seed` instead of that in which they were seen.
        offset: how many are passed over at first; they come after the last.

    Raises:
        DataError: there are none, or not more than `offset`.
    """

    def __init__(
        self,
        parts: Sequence[tuple[TokenDataset, int]],
        *,
        shuffled: bool = False,
        offset: int = 0,
        seed: int = 0,
    ) -> None:
        self.parts = [(dataset, count) for dataset, count in parts if count]
        self._ends = [*accumulate(count for _, count in self.parts)]
        self.size = self._ends[-1] if self._ends else 0
        self.offset, self._seed = offset, seed if shuffled else None
        if not self.size:
            raise DataError("replay.source has seen no samples yet")
        if not 0 <= offset < self.size:
            raise DataError(f"replay.offset is {offset}, but {self.size} samples were seen")

    def place(self, number: int) -> int:
        """Which of the samples that were seen, in their order, is replayed as `number` -th."""
        if not 0 <= number < self.size:
            raise DataError(f"replay: sample {number} of {self.size} that were seen")
        place = (self.offset + number) % self.size
        return place if self._seed is None else permuted(place, self.size, self._seed)

    def find(self, number: int) -> tuple[TokenDataset, int]:
        """The dataset of the sample that is replayed as `number` -th, and its index there."""
        place = self.place(number)
        which = bisect_right(self._ends, place)
        dataset, count = self.parts[which]
        return dataset, place - (self._ends[which] - count)

    def sample(self, number: int) -> Sample:
        """The sample that is replayed as `number` -th."""
        dataset, index = self.find(number)
        return dataset.sample(index)


class Group(NamedTuple):
    """Sources of a stage's replay that are one pool."""

    sources: list[str]
    share: float
    offset: int | None


def groups(replay: ReplayConfig) -> list[Group]:
    """The pools of a replay that has a share of its stage: one, or one a source."""
    share, offset = replay.share, replay.offset
    if not isinstance(share, list):
        assert not isinstance(offset, list), "validated with the recipe"
        return [Group(replay.sources, share, offset)] if share else []
    offsets = offset if isinstance(offset, list) else [offset] * len(share)
    found = zip(replay.sources, share, offsets, strict=True)
    return [Group([source], part, start) for source, part, start in found if part]


class Pools:
    """Pools in turns, by their shares.

    Args:
        pools: one or more.
        shares: a number above 0 for each.
    """

    def __init__(self, pools: Sequence[Pool], shares: Sequence[float]) -> None:
        self.pools, self._mixture = list(pools), Mixture(shares)

    @property
    def sizes(self) -> list[int]:
        """How many samples there are in each."""
        return [pool.size for pool in self.pools]

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` that are replayed come from each."""
        return self._mixture.counts(samples)

    def find(self, number: int) -> tuple[TokenDataset, int]:
        """The dataset of the sample that is replayed as `number` -th, and its index there."""
        which, place = self._mixture[number]
        return self.pools[which].find(place)


def permuted(index: int, size: int, seed: int) -> int:
    """Where a permutation of `range(size)` that `seed` chooses takes `index`.

    A Feistel network on the next even number of bits, walked until it lands below `size`: no list
    of a run's samples is held, however many these are.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            word = f"{seed} {size} {turn} {right}".encode()
            digest = hashlib.blake2b(word, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = (left << half) | right
        if index < size:
            return index
