"""Which experts each domain (source) of the data goes to."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rondo.models.ffn.dispatch import choose, count_by_row
from rondo.models.ffn.moe import MoE, mixture_layers, moe_options
from rondo.parallel.build import ParallelModel
from rondo.parallel.load import mixtures


class DomainLoads:
    """While it is open, counts the experts that one forward pass over a step's micro-batches
    chooses, by domain; choices that a capacity drops count too.

    Args:
        model: the model that makes the pass.
        sources: for each of this rank's micro-batches, in order, the domain of every sequence.
        names: the domains' names; `sources` are positions in it.
    """

    def __init__(
        self, model: ParallelModel, sources: Sequence[Sequence[int]], names: Sequence[str]
    ) -> None:
        self.ranks, self.names = model.ranks, names
        self._sources = [torch.tensor(each) for each in sources]
        self._mixtures = mixtures(model.parts)
        self._layers = mixture_layers(model.config)
        experts = moe_options(model.config).num_experts
        self._counts = torch.zeros(len(names), len(self._layers), experts, dtype=torch.float64)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> DomainLoads:
        self._handles = [
            mixture.router.register_forward_hook(self._hook(row, mixture))
            for row, layer in enumerate(self._layers)
            if (mixture := self._mixtures.get(layer)) is not None
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, row: int, mixture: MoE) -> Any:
        """Counts what follows from a router's logits. Every mixture meets the micro-batches in
        order, also in a pipeline."""
        turns = iter(self._sources)

        def count(module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
            options = mixture.options
            probabilities, bias = output[0].detach().softmax(-1), mixture.balance_bias
            chosen = choose(probabilities, options.top_k, renormalize=False, bias=bias).experts
            counts = count_by_row(chosen, options.num_experts).to("cpu", torch.float64)
            self._counts[:, row].index_add_(0, next(turns), counts)

        return count

    def tables(self) -> dict[str, list[list[float]]]:
        """For each domain that the step has sequences of, for each mixture, from the lowest, the
        share of the domain's choices that went to each expert. Collective; the same on every
        rank. (Tensor-parallel ranks count alike, each for itself: shares are as of one.)"""
        total = self._counts.new_tensor(self.ranks.sum(*self._counts.flatten().tolist()))
        total = total.view(self._counts.shape)
        return {
            name: (counts / counts.sum(-1, keepdim=True)).tolist()
            for name, counts in zip(self.names, total, strict=True)
            if counts.any()
        }
