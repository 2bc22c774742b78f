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
    """What is known of a run's domains; the losses they were learnt to are kept by the caller."""

    def __init__(self, recipe: Recipe) -> None:
        self._stages = stages_of(recipe)
        self._runs = {*replayed_runs(self._stages).values()}

    def begin(self, step: int, losses: Mapping[str, float]) -> dict[str, float]:
        """What the domains of earlier stages and runs were learnt to, from the `losses` before
        `step`, where nothing is known of earlier ones."""
        past = {domain_of(self._stages, stage) for stage in self._stages if stage.end <= step}
        return {name: loss for name, loss in losses.items() if name in past | self._runs}

    def observe(
        self, step: int, losses: Mapping[str, float], learnt: dict[str, float]
    ) -> dict[str, float]:
        """Metrics after `step`, whose `losses` these are; at the end of a stage, `learnt` takes
        the loss of its domain."""
        stage = stage_at(self._stages, step)
        own = domain_of(self._stages, stage)
        found = {
            f"forgetting/{name}": losses[name] - loss
            for name, loss in learnt.items()
            if name != own and name in losses
        }
        found[f"adaptation/{own}"] = losses[own]
        if step + 1 == stage.end:
            learnt[own] = losses[own]
        return found
