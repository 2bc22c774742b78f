"""What a run looks at between its steps: held-out text, norms, what routers do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rondo.parallel.counts import take_counts, take_gauges
from rondo.parallel.engines import NativeEngine
from rondo.parallel.load import load_shares, take_loads
from rondo.parallel.mesh import Ranks
from rondo.parallel.pipeline import MicroBatch
from rondo.pretrain.batches import RankBatches
from rondo.pretrain.data import TokenDataset, bits_per_byte
from rondo.pretrain.domain_loads import DomainLoads
from rondo.pretrain.domains import Domains
from rondo.pretrain.probe import layer_norms
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.routing import expert_similarity, router_gradients, routing

Tables = dict[str, list[list[float]]]


def due(step: int, every: int) -> bool:
    """Whether something done every `every` steps (0: never) is done after `step`."""
    return every > 0 and (step + 1) % every == 0


class Observer:
    """Looks at a model of `recipe`. Every rank calls its methods alike.

    Args:
        recipe: how often to look.
        model: the model.
        batches: this rank's share of global batches.
        held_out: held-out text by domain; one of name "" in a run without stages.
        sources: names of the sources of all samples.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: NativeEngine,
        batches: RankBatches,
        held_out: Mapping[str, TokenDataset],
        sources: Sequence[str],
    ) -> None:
        self.recipe, self.model, self.batches = recipe, model, batches
        self.held_out, self.sources, self.domains = held_out, sources, Domains(recipe)

    @property
    def ranks(self) -> Ranks:
        """All ranks."""
        return self.batches.ranks

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and bits per byte of the held-out text, of each domain and of all together; the
        same batches every time."""
        self.model.eval()
        found: dict[str, float] = {}
        everything = torch.zeros(3, dtype=torch.float64)
        for name, held_out in self.held_out.items():
            totals = torch.zeros(3, dtype=torch.float64)
            for number in range(self.recipe.evals.batches):
                batches = list(self.batches.global_batch(held_out, number))
                nats = self.model.evaluate(batches)
                totals += torch.tensor(self.batches.count(nats, batches))
            sums = self.ranks.sum(*totals.tolist())
            everything += torch.tensor(sums)
            if name:
                found |= _validation(f"validation/{name}", *sums)
        self.model.train()
        return _validation("validation", *everything.tolist()) | found

    def first(self, start: int, state: dict[str, Any]) -> dict[str, float]:
        """Validation before the first step of a run, or of stages that go on from a run without;
        nothing elsewhere. Notes in `state` what later validation is compared with."""
        staged = bool(self.recipe.stages)
        if "learnt" in state:  # an older rondo kept losses alone
            known = state["learnt"].items()
            state["learnt"] = {d: v if isinstance(v, dict) else {"loss": v} for d, v in known}
        if not self.held_out or ("learnt" in state if staged else start > 0):
            return {}
        found = self.validate()
        if start == 0:
            state["first_bits_per_byte"] = found["validation/bits_per_byte"]
        if staged:
            state["learnt"] = self.domains.begin(start, self._scores(found))
        return found

    def after(
        self,
        step: int,
        batches: list[MicroBatch],
        state: Mapping[str, Any],
        *,
        sources: Callable[[], Sequence[Sequence[int]]],
        loads: dict[int, torch.Tensor] | None = None,
        last: bool = False,
    ) -> tuple[dict[str, float], Tables]:
        """Validation, norms and tables, when they are due after `step`.

        Args:
            batches: this rank's micro-batches of the step; none where the step was long ago.
            state: the run's, as `first` left it.
            sources: gives the source of each sequence of `batches`.
            loads: of experts, in the step.
            last: whether the step is the last of a stage, after which validation is due.
        """
        extra: dict[str, float] = {}
        tables: Tables = {}
        if self.held_out and (last or due(step, self.recipe.evals.every)):
            extra |= self.validate()
            if batches and self.recipe.stages:
                extra |= self.domains.observe(step, self._scores(extra), state["learnt"])
        if batches and due(step, self.recipe.logging.norms_every):
            extra |= layer_norms(self.model, batches)
            if loads:
                tables["expert_load"] = load_shares(loads)
                found, by_source = self._routing(batches, sources())
                extra |= found
                tables |= by_source
            # What these passes counted belongs to no step.
            take_loads(self.model.parts, self.ranks)
            take_counts(self.model.parts, self.ranks)
            take_gauges(self.model.parts, self.ranks)
        return extra, tables

    def _scores(self, validation: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Loss and bits per byte by domain."""
        kinds = ("loss", "bits_per_byte")
        return {
            name: {kind: validation[f"validation/{name}/{kind}"] for kind in kinds}
            for name in self.held_out
        }

    def _routing(
        self, batches: list[MicroBatch], sources: Sequence[Sequence[int]]
    ) -> tuple[dict[str, float], Tables]:
        """What routers do, in a model with mixtures of experts; and the load of experts by source,
        where the data has several."""
        information = self.recipe.logging.router_information
        tables: Tables = {}
        if len(self.sources) > 1:
            with DomainLoads(self.model, sources, self.sources) as loads:
                found = routing(self.model, batches, information=information)
            tables = {f"expert_load/{name}": table for name, table in loads.tables().items()}
        else:
            found = routing(self.model, batches, information=information)
        if information:
            found |= expert_similarity(self.model)
        if not self.model.measures_gradients:
            return found, tables
        valid = sum(int((batch.targets >= 0).sum()) for batch in batches) * self.ranks.counts
        found |= router_gradients(self.model, batches, self.ranks.sum(valid)[0])
        return found, tables


def _validation(name: str, nats: float, valid: float, text: float) -> dict[str, float]:
    return {
        f"{name}/loss": nats / max(1, valid),
        f"{name}/bits_per_byte": bits_per_byte(nats, int(text)),
    }
