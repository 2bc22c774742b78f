"""Stages that cannot be, or do not fit together."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterator
from fractions import Fraction

from rondo.pretrain.data.mixture import Mixture
from rondo.pretrain.data.replay import Share, groups
from rondo.pretrain.plain import show
from rondo.pretrain.recipe import Recipe, ReplayConfig, SourceConfig
from rondo.pretrain.stages import EARLIER, Stage, all_sources, run_folder, source_keys, stages_of
from rondo.pretrain.validate_schedule import LARGEST, length_problems, schedule_problems

_LONGEST_NAME = 64


def stage_problems(recipe: Recipe) -> list[str]:
    """What is wrong with a recipe's stages; each problem starts with its key."""
    found = [*_names(recipe)]
    for number, config in enumerate(recipe.stages):
        key = f"stages.{number}"
        found += source_problems(f"{key}.data.sources", config.data.sources)
        found += length_problems(f"{key}.steps", config.steps, recipe, least=1)
    if found:
        return found
    found = [*_beginnings(recipe), *_streaming(recipe)]
    stages = stages_of(recipe)
    if stages[-1].end > LARGEST:
        found.append(f"stages: must have at most {LARGEST} steps in all, got {stages[-1].end}")
    for stage in stages if recipe.stages else ():
        found += _schedule(recipe, stage)
        found += _replay(recipe, stages, stage)
    return found


def source_problems(key: str, sources: list[SourceConfig]) -> Iterator[str]:
    """What is wrong with the sources at `key`."""
    for i, source in enumerate(sources):
        if not source.path:
            yield f"{key}.{i}.path: must not be empty"
        if not 0 < source.weight < math.inf:
            weight = show(source.weight)
            yield f"{key}.{i}.weight: must be a finite number above 0, got {weight}"
        if source.shuffle_buffer < 1:
            yield f"{key}.{i}.shuffle_buffer: must be at least 1, got {source.shuffle_buffer}"


def _names(recipe: Recipe) -> Iterator[str]:
    seen: dict[str, int] = {}
    for number, config in enumerate(recipe.stages):
        key, name = f"stages.{number}.name", config.name
        if not name.strip(". ") or len(name) > _LONGEST_NAME or set(name) & set("/\\"):
            yield (
                f"{key}: must be a name, 1 to {_LONGEST_NAME} characters without / or \\, got "
                f"{show(name)}"
            )
        elif name == EARLIER:
            yield f"{key}: {show(name)} stands for all stages before; take another name"
        elif name in seen:
            yield f"{key}: {show(name)} is the name of stages.{seen[name]} already"
        seen.setdefault(name, number)


def _beginnings(recipe: Recipe) -> Iterator[str]:
    """Whether each stage says in one way what it begins with."""
    for number, config in enumerate(recipe.stages):
        key = f"stages.{number}"
        if not config.reset_step and number == 0:
            yield (
                f"{key}.reset_step: there is no stage before the first whose schedule could go on; "
                "checkpoint.resume goes on in another run"
            )
        elif not config.reset_step and config.schedule is not None:
            before = recipe.stages[number - 1].name
            yield (
                f"{key}.schedule: with reset_step false the schedule of stage {show(before)} goes "
                "on; leave one of both out"
            )
        for other in ("init_from", "resume"):
            value = getattr(recipe.checkpoint, other)
            if number == 0 and config.init_from and value not in (None, "auto", "never"):
                yield (
                    f"{key}.init_from: the run begins with checkpoint.{other} ({show(value)}) "
                    "already; leave one of both out"
                )


def _streaming(recipe: Recipe) -> Iterator[str]:
    """Whether a source is streamed in one way wherever it is read, and never replayed."""
    stages = stages_of(recipe)
    known = dict(zip(source_keys(all_sources(recipe)), all_sources(recipe), strict=True))
    for stage in stages:
        key = f"stages.{stage.number}"
        for name, source in zip(source_keys(stage.sources), stage.sources, strict=True):
            first = known[name]
            how = (source.streaming, source.shuffle_buffer)
            if how != (first.streaming, first.shuffle_buffer):
                yield (
                    f"{key}.data.sources: {show(source.path)} is read with streaming "
                    f"{first.streaming} and shuffle_buffer {first.shuffle_buffer} by an earlier "
                    f"stage, and goes on as it was, got {how[0]} and {how[1]}"
                )
        if stage.replay is None:
            continue
        for other in stages[: stage.number]:
            if not {other.name, EARLIER} & {*stage.replay.sources}:
                continue
            for source in other.sources:
                if source.streaming:
                    yield (
                        f"{key}.replay: stage {show(other.name)} streams {show(source.path)}, of "
                        "which no tokens are kept to replay; prepare it (rondo prepare)"
                    )


def _schedule(recipe: Recipe, stage: Stage) -> Iterator[str]:
    """Whether the schedule that begins with a stage fits."""
    if stage.schedule_start != stage.start:
        return
    steps = stage.schedule_steps
    alone = dataclasses.replace(recipe, steps=steps, schedule=stage.schedule, stages=[])
    own = recipe.stages[stage.number].schedule is not None
    for problem in schedule_problems(alone):
        if not problem.startswith("schedule."):
            continue
        if own:
            yield problem.replace("schedule.", f"stages.{stage.number}.schedule.")
        else:
            yield f"{problem} (stage {show(stage.name)})"


def _replay(recipe: Recipe, stages: list[Stage], stage: Stage) -> Iterator[str]:
    replay, key = stage.replay, f"stages.{stage.number}.replay"
    if replay is None:
        return
    found = [*_replay_numbers(replay, key)] or [*_replay_sources(replay, stages, stage, key)]
    yield from found or _supply(recipe, stages, stage)


def _replay_numbers(replay: ReplayConfig, key: str) -> Iterator[str]:
    """Shares, offsets and the seed of a replay."""
    count = len(replay.sources)
    for name in ("share", "offset"):
        value = getattr(replay, name)
        if isinstance(value, list) and not (
            len(value) == count and isinstance(replay.share, list) and replay.sources
        ):
            yield (
                f"{key}.{name}: a list has one for each of the {count} of {key}.source, and is "
                f"of shares and offsets or of shares alone, got {show(value)}"
            )
            return
    shares = replay.share if isinstance(replay.share, list) else [replay.share]
    if not all(0 <= share <= 1 for share in shares):
        yield f"{key}.share: must be from 0 to 1, got {show(replay.share)}"
    elif sum(Fraction(repr(float(share))) for share in shares) > 1:
        yield f"{key}.share: must be at most 1 together, got {show(replay.share)}"
    offsets = replay.offset if isinstance(replay.offset, list) else [replay.offset]
    for name, values in (("offset", offsets), ("seed", [replay.seed])):
        for value in values:
            if value is not None and not 0 <= value <= LARGEST:
                got = show(getattr(replay, name))
                yield f"{key}.{name}: must be at least 0 and at most {LARGEST}, got {got}"


def _replay_sources(
    replay: ReplayConfig, stages: list[Stage], stage: Stage, key: str
) -> Iterator[str]:
    """Whether what is replayed is there."""
    earlier = {other.name for other in stages[: stage.number]}
    if not replay.sources:
        yield f"{key}.source: must name a stage or a run"
    named = {each if each in earlier else run_folder(each).resolve() for each in replay.sources}
    if len(named) < len(replay.sources):
        yield (
            f"{key}.source: names one twice, {show(replay.source)}; none is replayed twice (a run "
            "and its checkpoints have seen the same)"
        )
    for source in replay.sources:
        if source == EARLIER and not earlier:
            yield f"{key}.source: there is no stage before the first; name another run's folder"
        elif source == EARLIER and isinstance(replay.source, list):
            known = ", ".join(sorted(earlier))
            yield f"{key}.source: {show(EARLIER)} stands alone; in a list name stages ({known})"
        elif source in {other.name for other in stages} - earlier:
            known = ", ".join(sorted(earlier)) or "none"
            yield (
                f"{key}.source: stage {show(source)} does not come before this one "
                f"(earlier stages: {known})"
            )
        elif source not in {*earlier, EARLIER} and not os.path.exists(source):
            near = difflib.get_close_matches(source, [*sorted(earlier), EARLIER], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield (
                f"{key}.source: {show(source)} is neither an earlier stage "
                f"({', '.join(sorted(earlier)) or 'none'}) nor the folder of a run{hint}"
            )


def _supply(recipe: Recipe, stages: list[Stage], stage: Stage) -> Iterator[str]:
    """Whether earlier stages see as many samples as are to be replayed; what other runs have seen
    is known when they are opened."""
    replay, key = stage.replay, f"stages.{stage.number}.replay"
    assert replay is not None, "the caller has seen to it"
    batch, found = recipe.data.global_batch_size, groups(replay)
    samples = stage.steps * batch
    replayed = Share(replay.share).before(samples)
    counts = Mixture([group.share for group in found]).counts(replayed) if found else []
    for group, needed in zip(found, counts, strict=True):
        if not {*group.sources} <= {EARLIER, *(other.name for other in stages)}:
            continue
        size = sum(
            _new_samples(other, batch)
            for other in stages[: stage.number]
            if {other.name, EARLIER} & {*group.sources}
        )
        names = " and ".join(group.sources)
        if group.offset is not None and group.offset >= size:
            yield f"{key}.offset: must be below the {size} samples of {names}, got {group.offset}"
        if needed > size:
            yield (
                f"{key}.share: {show(group.share)} of {samples} samples are {needed}, but "
                f"{names} sees {size} new ones and none is replayed twice; at most "
                f"{math.floor(1e4 * size / samples) / 1e4:g}"
            )


def _new_samples(stage: Stage, batch: int) -> int:
    """How many samples of a stage are not replayed; 0 where its share is none, which is told."""
    samples, share = stage.steps * batch, stage.replay.share if stage.replay else 0.0
    shares = share if isinstance(share, list) else [share]
    possible = all(0 <= each <= 1 for each in shares) and sum(shares) <= 1
    return samples - Share(share).before(samples) if possible else 0
