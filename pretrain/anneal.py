"""`rondo anneal`: an annealed model from the middle of a run, which itself is left as it is.

The branch is a run of its own. It goes on from a checkpoint of the other with parameters,
optimizer and place in the data, and its learning rate falls from what it was there to
`final_ratio` along `shape` (exponentially: `eta (eta_min / eta)^(y / A)` at step y of A, as
arXiv 2403.08763 anneals).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rondo.errors import UserError
from rondo.models.loading import find_checkpoint
from rondo.pretrain.data import read_seen
from rondo.pretrain.data.replay import groups
from rondo.pretrain.lengths import in_steps
from rondo.pretrain.options import help_text, parse_dataclass, split_arguments
from rondo.pretrain.parse import dump_recipe, load_recipe
from rondo.pretrain.recipe import (
    Recipe,
    ReplayConfig,
    ReweightConfig,
    ScheduleConfig,
    StageConfig,
    StageDataConfig,
)
from rondo.pretrain.run_data import replay_file, require_same_recipe
from rondo.pretrain.stages import (
    EARLIER,
    Stage,
    rate,
    replayed_runs,
    stage_at,
    stages_of,
    step_tokens,
    total_steps,
)
from rondo.pretrain.validate import validate

_USAGE = "rondo anneal RUN [--at STEP] [--steps N] [--option value]..."
_DESCRIPTION = """\
Branches an annealed model off RUN, the folder of a run: a run of its own, beside it, that goes on
from its checkpoint after STEP while the learning rate falls. RUN is only read."""


@dataclass
class AnnealConfig:
    """What to branch off, and how to anneal it."""

    run: str
    """Folder of the run."""
    at: int | None = None
    """Steps after which the branch leaves it: those of one of its checkpoints; None: the newest."""
    steps: int | str = "10%"
    """Length of the anneal: steps, tokens ("2B tokens"), or a share of the steps before it."""
    name: str | None = None
    """Name of the branch; None: that of the run, "-anneal-" and the step."""
    shape: Literal[
        "exponential", "linear", "cosine", "1-sqrt", "megatron-exponential", "inverse"
    ] = "exponential"
    """How the learning rate falls (`schedule.decay_shape`)."""
    final_ratio: float | None = None
    """Learning rate at the end, over optimizer.lr; None: the final_ratio of the run's schedule. The
    shapes exponential and inverse end at a thousandth of the rate at AT where this is less or 0."""
    write: str | None = None
    """File to write the branch's recipe to, for `rondo launch` or torchrun, instead of training."""


def main(words: Sequence[str]) -> int:
    """Runs the command. Returns the exit code of training, or 0."""
    if split_arguments(words).wants_help:
        print(help_text(AnnealConfig, _USAGE, _DESCRIPTION), end="")
        return 0
    config = parse_dataclass(AnnealConfig, words, "rondo anneal", ("run",))
    recipe = branch(config)
    require_same_recipe(Path(recipe.output_dir) / recipe.name, recipe)
    keep_replay(Path(config.run), recipe)
    if config.write is not None:
        Path(config.write).write_text(dump_recipe(recipe))
        print(f"wrote {config.write}")
        return 0
    from rondo.pretrain.train import train

    return train(recipe)


def branch(config: AnnealConfig) -> Recipe:
    """The recipe of the branch. Raises UserError where there is no such checkpoint, or the recipe
    cannot be."""
    folder = Path(config.run)
    checkpoint = _checkpoint(folder, config.at)
    recipe = load_recipe(folder / "recipe.yaml")
    step, stages = int(checkpoint.name.removeprefix("step-")), stages_of(recipe)
    if step == 0:
        raise UserError(f"at: {checkpoint} is of a run before its first step")
    last = stage_at(stages, step - 1)
    past = list(recipe.stages) or [StageConfig("main")]
    past = past[: last.number + 1]
    names = {stage.name for stage in past}
    name = next(n for n in ("anneal", *(f"anneal-{i}" for i in range(len(past)))) if n not in names)
    ratio = rate(stages, min(step, last.end - 1), step_tokens(recipe))
    final = last.schedule.final_ratio if config.final_ratio is None else config.final_ratio
    if not 0 <= final < ratio:
        raise UserError(
            f"final_ratio: must be at least 0 and below the learning rate after step {step}, which "
            f"is {ratio:.4g} of optimizer.lr, got {final:g}"
        )
    anneal = StageConfig(
        name=name,
        steps=config.steps,
        data=StageDataConfig(list(last.sources)),
        schedule=ScheduleConfig(
            "wsd", peak_ratio=ratio, decay_steps="100%", decay_shape=config.shape,
            final_ratio=final,
        ),
        replay=_going_on(stages, last, checkpoint),
        reset_optimizer=False,
    )  # fmt: skip
    found = dataclasses.replace(
        recipe,
        name=config.name or f"{recipe.name}-anneal-{step}",
        output_dir=str(folder.resolve().parent),
        steps=step,
        stages=[*_shortened(past, stages, step, ratio), anneal],
        reweight=_reweight(recipe),
        checkpoint=dataclasses.replace(
            recipe.checkpoint, resume=str(checkpoint.resolve()), init_from=None
        ),
    )
    if (folder.resolve().parent / found.name).resolve() == folder.resolve():
        raise UserError(f"name: {found.name!r} is the run itself; a branch has a name of its own")
    validate(found)
    return found


def keep_replay(run: Path, recipe: Recipe) -> None:
    """Hands what other runs had seen when `run` began to replay them on to the branch `recipe`."""
    own = Path(recipe.output_dir) / recipe.name
    for file in sorted((run / "replay").glob("*.json")):
        (own / "replay").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, own / "replay" / file.name)
    stages = stages_of(recipe)
    *_, cut, anneal = stages
    for name, source in replayed_runs(stages):
        kept = replay_file(own, cut, source)
        if name == anneal.name and kept.is_file():
            shutil.copy(kept, replay_file(own, anneal, source))


def _checkpoint(folder: Path, step: int | None) -> Path:
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"run: {folder} is not the folder of a run: it has no recipe.yaml")
    if step is None:
        return find_checkpoint(folder)
    found = sorted((folder / "checkpoints").glob("step-*/manifest.json"))
    steps = [int(path.parent.name.removeprefix("step-")) for path in found]
    if step not in steps:
        near = f"; the nearest is {min(steps, key=lambda s: abs(s - step))}" if steps else ""
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(f"at: {folder} has no checkpoint after step {step} (steps: {there}){near}")
    return found[steps.index(step)].parent


def _shortened(
    past: list[StageConfig], stages: list[Stage], step: int, ratio: float
) -> list[StageConfig]:
    """The stages before the branch, their lengths in steps. The schedule that is broken off is not
    known to end there, so it is written down as what it comes to at `step`; it is not run again."""
    cut = stages[len(past) - 1]
    owner = next(stage for stage in stages if stage.start == cut.schedule_start)
    found = []
    for config, stage in zip(past, stages, strict=False):
        steps = min(stage.steps, step - stage.start)
        config = dataclasses.replace(config, steps=steps, init_from=None)
        if stage is owner:
            config.schedule = ScheduleConfig("constant", peak_ratio=ratio, final_ratio=0.0)
        found.append(config)
    return found


def _reweight(recipe: Recipe) -> ReweightConfig:
    """The run's, with a warm-up that does not get longer with the run."""
    total, config = total_steps(recipe), recipe.reweight
    warmup = in_steps(config.warmup_steps, total, step_tokens(recipe), up=True)
    return dataclasses.replace(config, warmup_steps=warmup)


def _going_on(stages: list[Stage], stage: Stage, checkpoint: Path) -> ReplayConfig | None:
    """The replay of a stage from where it was at a checkpoint; after the last of what was seen
    comes the first again. `earlier` is told by name: seen from the branch the stage itself is an
    earlier one."""
    replay = stage.replay
    if replay is None:
        return None
    if replay.source == EARLIER:
        before = [other.name for other in stages[: stage.number]]
        replay = dataclasses.replace(replay, source=before if len(before) > 1 else before[0])
    found = groups(replay)
    if not found:
        return replay
    record = read_seen(str(checkpoint)).record["stages"][-1]["replay"]
    sizes, counts, begun = (
        record[key] if isinstance(record[key], list) else [record[key]] * len(found)
        for key in ("of", "samples", "offset")
    )
    offsets = (
        begin if group.offset is None else group.offset
        for group, begin in zip(found, begun, strict=False)
    )
    starts = {
        group.sources[0]: (offset + count) % size
        for group, offset, count, size in zip(found, offsets, counts, sizes, strict=True)
    }
    each = [starts.get(source, 0) for source in replay.sources]
    return dataclasses.replace(replay, offset=each if isinstance(replay.share, list) else each[0])
