"""Held-out text of every stage, and how much of what was learnt is forgotten.

With L_d(t) the validation loss on domain d after step t, and e_d the end of the last stage on d so
far (for another run that is replayed: the beginning of this one), `forgetting/d` is L_d(t) -
L_d(e_d), in nats a token, and `adaptation/d` is L_d(t) for the domain of the stage at hand
(arXiv 2403.08763).
"""

from __future__ import annotations

from collections.abc import Mapping

from rondo.pretrain.data import Curriculum, Sources, TokenDataset
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.stages import (
    all_sources,
    domain_of,
    replayed_runs,
    source_keys,
    stage_at,
    stages_of,
)

Scores = Mapping[str, Mapping[str, float]]
"""Loss and bits per byte, by domain."""
Learnt = dict[str, dict[str, float]]


def open_held_out(
    recipe: Recipe, sources: Sources, training: Curriculum
) -> dict[str, TokenDataset]:
    """Validation text by domain: of every stage, and of other runs that are replayed; of one
    without a name in a run without stages. `sources` are `all_sources(recipe)`, prepared."""
    stages, keys = stages_of(recipe), source_keys(all_sources(recipe))
    chosen: dict[str, Sources] = {}
    for stage in stages:
        numbers = [keys.index(key) for key in source_keys(stage.sources)]
        weights = [source.weight for source in stage.sources]
        selected = sources.select(numbers, weights, [0] * len(numbers))
        chosen.setdefault(domain_of(stages, stage), selected)
    for key, name in replayed_runs(stages).items():
        chosen.setdefault(name, training.seen[key].held_out(training.tokenizer))
    length, seed, vocab_size = training.sequence_length, training.seed, training.vocab_size
    return {
        name: TokenDataset(each, length, seed, "validation", vocab_size)
        for name, each in chosen.items()
    }


class Domains:
    """What is known of a run's domains. What they were learnt to is kept by the caller: by domain
    the loss and the bits per byte, and the `step` after which these were measured."""

    def __init__(self, recipe: Recipe) -> None:
        self._stages = stages_of(recipe)
        self._runs = {*replayed_runs(self._stages).values()}

    def begin(self, step: int, scores: Scores) -> Learnt:
        """What the domains of earlier stages and runs were learnt to, from the `scores` before
        `step`, where nothing is known of earlier ones."""
        past = {domain_of(self._stages, stage) for stage in self._stages if stage.end <= step}
        known = past | self._runs
        return {name: {**each, "step": step} for name, each in scores.items() if name in known}

    def observe(self, step: int, scores: Scores, learnt: Learnt) -> dict[str, float]:
        """Metrics after `step`, whose `scores` these are; at the end of a stage, `learnt` takes
        those of its domain."""
        stage = stage_at(self._stages, step)
        own = domain_of(self._stages, stage)
        found = {
            f"forgetting/{name}": scores[name]["loss"] - left["loss"]
            for name, left in learnt.items()
            if name != own and name in scores
        }
        found[f"adaptation/{own}"] = scores[own]["loss"]
        if step + 1 == stage.end:
            learnt[own] = {**scores[own], "step": step + 1}
        return found


def learnt_metrics(learnt: Learnt) -> dict[str, float]:
    """`learnt/<domain>/...`: what forgetting is counted from, for the first row of a run that goes
    on with another."""
    return {
        f"learnt/{name}/{key}": value
        for name, left in learnt.items()
        for key, value in left.items()
    }
