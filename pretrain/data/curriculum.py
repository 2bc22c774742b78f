"""The data of a run in stages: the sample at a global index, and which were consumed by a step.

Stage k holds the global samples `[start B, end B)`. Within it `Share` says which of them are
replayed; the others come from the stage's own mixture, whose sources go on where earlier stages
left them. All of it is a pure function of (recipe, seed, index) and of what other runs had seen
when this one began.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rondo.pretrain.data.dataset import Batch, Sample, Sources, TokenDataset, stack
from rondo.pretrain.data.duplicates import read_multiplicities
from rondo.pretrain.data.errors import DataError
from rondo.pretrain.data.repeats import Repeats, account
from rondo.pretrain.data.replay import Group, Pool, Pools, Share, groups
from rondo.pretrain.data.seen import Seen, stage_record
from rondo.pretrain.recipe import Recipe, ReplayConfig
from rondo.pretrain.stages import EARLIER, Stage, all_sources, replayed_runs, source_keys, stages_of

__all__ = ["Curriculum", "Part"]


@dataclass
class Part:
    """The data of one stage."""

    stage: Stage
    first: int
    """Global index of its first sample."""
    samples: int
    own: TokenDataset
    """What is new in it."""
    share: Share
    pools: Pools | None
    """What is replayed in it."""

    def consumed(self, samples: int) -> tuple[int, int]:
        """How many new and replayed samples are among its first `samples`."""
        replayed = self.share.before(samples) if self.pools else 0
        return samples - replayed, replayed

    def find(self, index: int) -> tuple[TokenDataset, int, bool]:
        """Dataset and index there of its sample `index`, and whether it is replayed."""
        new, replayed = self.consumed(index)
        if self.pools and self.share.holds(index):
            return *self.pools.find(replayed), True
        return self.own, new, False


class Curriculum:
    """All samples of a run.

    Args:
        recipe: the run.
        sources: `all_sources(recipe)`, prepared.
        vocab_size: rows of the embedding (default: the tokenizer's).
        seen: what other runs had seen, by the name of the stage and the source of its replay.

    Raises:
        DataError: as `TokenDataset`; and where more is to be replayed than was seen.
    """

    def __init__(
        self,
        recipe: Recipe,
        sources: Sources,
        vocab_size: int | None = None,
        seen: Mapping[tuple[str, str], Seen] | None = None,
    ) -> None:
        self._sources, self.batch_size = sources, recipe.data.global_batch_size
        self.tokenizer = sources.tokenizer
        self.sequence_length, self.seed = recipe.data.sequence_length, recipe.seed
        self.vocab_size = vocab_size or sources.tokenizer.vocab_size
        self._keys = source_keys(all_sources(recipe))
        self._names = replayed_runs(stages_of(recipe))
        self._runs = list(dict.fromkeys(self._names.values()))
        self.seen = dict(seen or {})
        self._foreign: dict[TokenDataset, int] = {}
        self._replayed: dict[tuple[str, ...], int] = {}
        """By sources, order and seed, where the last stage ended in what it replayed."""
        self.parts: list[Part] = []
        begins = [0] * len(self._keys)
        for stage in stages_of(recipe):
            part = self._part(stage, begins)
            self.parts.append(part)
            for number, end in part.own.ends(part.consumed(part.samples)[0]).items():
                begins[number] = end

    def _part(self, stage: Stage, begins: Sequence[int]) -> Part:
        numbers = [self._keys.index(key) for key in source_keys(stage.sources)]
        weights = [source.weight for source in stage.sources]
        chosen = self._sources.select(numbers, weights, [begins[number] for number in numbers])
        own = TokenDataset(chosen, self.sequence_length, self.seed, vocab_size=self.vocab_size)
        first, samples = stage.start * self.batch_size, stage.steps * self.batch_size
        share = Share(stage.replay.share if stage.replay else 0.0)
        part = Part(stage, first, samples, own, share, None)
        if stage.replay and share:
            own_groups = groups(stage.replay)
            pools = [self._pool(stage, group) for group in own_groups]
            part.pools = Pools(pools, [group.share for group in own_groups])
            counts = part.pools.counts(share.before(samples))
            for group, needed, pool in zip(own_groups, counts, pools, strict=True):
                self._replayed[self._order_of(stage, group)] = pool.offset + needed
                if needed > pool.size:
                    raise DataError(
                        f"stages.{stage.number}.replay: {needed} samples of "
                        f"{' and '.join(group.sources)}, which has seen {pool.size}; none is "
                        "replayed twice, so take a smaller share or fewer steps"
                    )
        return part

    def _order_of(self, stage: Stage, group: Group) -> tuple[str, ...]:
        """What two stages that replay the same samples in the same order have in common."""
        assert stage.replay is not None, "the caller has seen to it"
        names = (self._names.get((stage.name, source), source) for source in group.sources)
        return *names, stage.replay.order, str(stage.replay.seed)

    def _pool(self, stage: Stage, group: Group) -> Pool:
        replay, key = stage.replay, f"stages.{stage.number}.replay"
        assert replay is not None, "the caller has seen to it"
        parts = [found for source in group.sources for found in self._seen_by(stage, source)]
        shuffled, offset = replay.order == "reshuffled", group.offset
        if offset is None:
            size = sum(count for _, count in parts)
            offset = self._replayed.get(self._order_of(stage, group), 0) % max(1, size)
        try:
            return Pool(parts, shuffled=shuffled, offset=offset, seed=replay.seed)
        except DataError as error:
            raise DataError(f"{key}: {error}") from None

    def _seen_by(self, stage: Stage, source: str) -> list[tuple[TokenDataset, int]]:
        """What `source`, of the replay of `stage`, has seen as new: datasets, and how many samples
        of each."""
        if (stage.name, source) not in self.seen:
            return [
                (part.own, part.consumed(part.samples)[0])
                for part in self.parts
                if source in (part.stage.name, EARLIER)
            ]
        key = f"stages.{stage.number}.replay.source"
        seen = self.seen[stage.name, source]
        parts = seen.open(self.tokenizer, self.sequence_length, self.vocab_size, key)
        number = len(self._keys) + self._runs.index(self._names[stage.name, source])
        self._foreign |= {dataset: number for dataset, _ in parts}
        return parts

    def find(self, index: int) -> tuple[TokenDataset, int, bool]:
        """Dataset and index there of the sample at global `index`, and whether it is replayed."""
        part = next(part for part in reversed(self.parts) if index >= part.first)
        return part.find(index - part.first)

    def sample(self, index: int) -> Sample:
        """The sequence at global `index`."""
        dataset, place, _ = self.find(index)
        return dataset.sample(place)

    def source(self, index: int) -> int:
        """Position of the source of the sample at global `index` in `all_sources`; behind these,
        other runs that are replayed have a number each."""
        dataset, place, _ = self.find(index)
        return self._foreign.get(dataset) or dataset.source(place)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The sequences at `indices`, stacked."""
        return stack([self.sample(i) for i in indices])

    def epochs(self, samples: int) -> dict[int, float]:
        """How often each source (by its position in `all_sources`) was read after `samples`
        samples; what was replayed is not counted again."""
        found: dict[int, float] = {}
        for part in self._begun(samples):
            found |= part.own.epochs(part.consumed(min(part.samples, samples - part.first))[0])
        return found

    def repeats(self, names: Sequence[str]) -> list[Repeats]:
        """How the whole run reads each source; `names` are those of `all_sources`. As in `epochs`,
        what is replayed is not counted again."""
        unique: dict[int, int] = {}
        ends: dict[int, int] = {}
        for part in self.parts:
            unique |= part.own.unique_tokens()
            ends |= part.own.ends(part.consumed(part.samples)[0])
        copies = {n: read_multiplicities(self._sources.folders[n]) for n in unique}
        return account(names, unique, ends, self.sequence_length, copies)

    def fingerprint(self, step: int = 0) -> str:
        """Hash of everything that the samples before `step` depend on: later stages, and how long
        the one at `step` lasts, can still be changed."""
        samples = step * self.batch_size
        begun = self._begun(samples)
        if len(begun) == 1 and begun[0].pools is None:
            return begun[0].own.fingerprint()
        text = json.dumps([self._describe(part) for part in begun], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _describe(self, part: Part) -> list[Any]:
        replay = part.stage.replay
        if part.pools is None or replay is None:
            return [part.first, part.own.fingerprint()]
        options = {**asdict(replay), "source": None, "offset": _offset(part.pools, replay)}
        pools = [
            [[dataset.fingerprint(), count] for dataset, count in pool.parts]
            for pool in part.pools.pools
        ]
        return [part.first, part.own.fingerprint(), options, _plain(pools)]

    def consumed(self, step: int) -> dict[str, Any]:
        """What was consumed before `step`, as JSON: by stage and source the range of samples, and
        what was replayed. `Seen` reads it."""
        samples = step * self.batch_size
        stages = []
        for part in self._begun(samples):
            new, replayed = part.consumed(min(part.samples, samples - part.first))
            record = stage_record(part.stage, part.own, new)
            record["first_sample"] = part.first
            if part.stage.replay and part.pools:
                found = {"of": part.pools.sizes, "samples": part.pools.counts(replayed)}
                plain = {name: _plain(values) for name, values in found.items()}
                offset = _offset(part.pools, part.stage.replay)
                record["replay"] = {**asdict(part.stage.replay), "offset": offset, **plain}
            stages.append(record)
        return {
            "version": 1,
            "step": step,
            "samples": samples,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "tokenizer": self.tokenizer.fingerprint(),
            "stages": stages,
        }

    def stream_states(self, step: int) -> dict[str, Any]:
        """Where streamed sources stand before `step`, by number, as JSON: what spares reading them
        from their beginning. `resume_streams` takes it."""
        samples, found = step * self.batch_size, {}
        for part in self._begun(samples):
            ends = part.own.ends(part.consumed(min(part.samples, samples - part.first))[0])
            for number, source in part.own.streamed().items():
                found[str(number)] = source.state(ends[number] * self.sequence_length)
        return found

    def resume_streams(self, states: Mapping[str, Any]) -> None:
        """Goes on where `stream_states` said."""
        for number, state in states.items():
            self._sources.streamed[int(number)].resume(state)

    def _begun(self, samples: int) -> list[Part]:
        """The stages that any of the first `samples` samples belong to; always the first."""
        return [part for part in self.parts if part.first < samples or part.first == 0]


def _offset(pools: Pools, replay: ReplayConfig) -> Any:
    """`replay.offset`, or where the recipe leaves it open what that comes to in each pool: 0 if it
    is in all."""
    if replay.offset is not None:
        return replay.offset
    offsets = [pool.offset for pool in pools.pools]
    return _plain(offsets) if any(offsets) else 0


def _plain(values: list[Any]) -> Any:
    """What is said of pools, where there are several; of the only one, alone."""
    return values if len(values) > 1 else values[0]
