"""Stages of a run: where each begins, what it reads, and the learning rate over all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rondo.pretrain.lengths import in_steps
from rondo.pretrain.recipe import Recipe, ReplayConfig, ScheduleConfig, SourceConfig, StageConfig
from rondo.pretrain.schedules import factor

EARLIER = "earlier"
"""`replay.source` for all stages before."""


@dataclass(frozen=True)
class Stage:
    """A stage with its place in the run."""

    name: str
    """Empty in a run without stages."""
    number: int
    start: int
    """Its first step (0-based, of the whole run)."""
    steps: int
    sources: Sequence[SourceConfig]
    replay: ReplayConfig | None
    init_from: str | None
    reset_optimizer: bool
    schedule: ScheduleConfig
    schedule_start: int
    """The step of the run at which its schedule began; that of an earlier stage if it goes on."""
    schedule_steps: int
    """Steps that its schedule spans."""

    @property
    def end(self) -> int:
        """The step after its last."""
        return self.start + self.steps


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe; a run without stages is one. Raises ValueError for lengths that are
    none."""
    configs = recipe.stages or [StageConfig("")]
    lengths = [stage_steps(recipe, config) for config in configs]
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    found: list[Stage] = []
    for number, config in enumerate(configs):
        owner = number
        while owner and not configs[owner].reset_step:
            owner -= 1
        last = number
        while last + 1 < len(configs) and not configs[last + 1].reset_step:
            last += 1
        found.append(
            Stage(
                name=config.name,
                number=number,
                start=starts[number],
                steps=lengths[number],
                sources=config.data.sources or recipe.data.sources,
                replay=config.replay,
                init_from=config.init_from,
                reset_optimizer=config.reset_optimizer,
                schedule=configs[owner].schedule or recipe.schedule,
                schedule_start=starts[owner],
                schedule_steps=sum(lengths[owner : last + 1]),
            )
        )
    return found


def stage_steps(recipe: Recipe, config: StageConfig) -> int:
    """Length of a stage. Raises ValueError where it is none."""
    return in_steps(config.steps, recipe.steps, step_tokens(recipe))


def step_tokens(recipe: Recipe) -> int:
    """Tokens of a step."""
    return recipe.data.global_batch_size * recipe.data.sequence_length


def total_steps(recipe: Recipe) -> int:
    """Steps of the whole run."""
    return stages_of(recipe)[-1].end


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that a step (or the end of the run) belongs to."""
    return next((stage for stage in stages if step < stage.end), stages[-1])


def rate(stages: Sequence[Stage], step: int, tokens: int) -> float:
    """The learning rate of a step of `tokens` tokens, over optimizer.lr."""
    stage = stage_at(stages, step)
    local = step - stage.schedule_start
    return factor(local, stage.schedule_steps, stage.schedule, tokens)


def source_keys(sources: Sequence[SourceConfig]) -> list[tuple[str, int]]:
    """What tells the sources of one stage apart, and names them in all: the path, and how many
    sources of the same path there are before."""
    seen: Counter[str] = Counter()
    keys = []
    for source in sources:
        keys.append((source.path, seen[source.path]))
        seen[source.path] += 1
    return keys


def all_sources(recipe: Recipe) -> list[SourceConfig]:
    """The sources of all stages, each once, in the order in which they are first named."""
    found: dict[tuple[str, int], SourceConfig] = {}
    for stage in stages_of(recipe):
        for key, source in zip(source_keys(stage.sources), stage.sources, strict=True):
            found.setdefault(key, source)
    return list(found.values())


def domain_of(stages: Sequence[Stage], stage: Stage) -> str:
    """The name of what a stage reads: that of the first stage with the same mixture."""
    return next(other.name for other in stages if other.sources == stage.sources)


def run_folder(source: str) -> Path:
    """The folder of the run that a `replay.source` names by itself or by one of its checkpoints."""
    path = Path(source)
    return path.parents[1] if path.parent.name == "checkpoints" else path


def replayed_runs(stages: Sequence[Stage]) -> dict[tuple[str, str], str]:
    """By name of the stage and `replay.source`, a name for each other run that is replayed: that of
    its folder, numbered where it is another's."""
    names = {stage.name for stage in stages}
    runs: dict[Path, str] = {}
    found = {}
    for stage in stages:
        for source in stage.replay.sources if stage.replay else ():
            if source in {*names, EARLIER}:
                continue
            run = run_folder(source).resolve()
            if run not in runs:
                name = f"run {run.name}" if run.name in {*names, EARLIER} else run.name
                runs[run] = name if name not in runs.values() else f"{name} {len(runs) + 1}"
            found[stage.name, source] = runs[run]
    return found


def plan_of(recipe: Recipe) -> dict[str, Any]:
    """The stages as JSON: what `stages.json` in the run folder says."""
    stages = stages_of(recipe)
    return {
        "steps": stages[-1].end,
        "replayed_runs": sorted(set(replayed_runs(stages).values())),
        "stages": [
            {
                "name": stage.name,
                "start": stage.start,
                "steps": stage.steps,
                "domain": domain_of(stages, stage),
                "sources": [source.path for source in stage.sources],
            }
            for stage in stages
        ],
    }
