"""What routers do: how sure they are, what layers know of each other, what moves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rondo.models import Decoder, ModelConfig
from rondo.models.ffn.moe import MoE
from rondo.parallel.build import ParallelModel
from rondo.parallel.load import mixtures, take_loads
from rondo.parallel.pipeline import MicroBatch
from rondo.pretrain.probe import gather_sums

BINS = 100


@torch.no_grad()
def routing(
    model: ParallelModel, batches: Sequence[MicroBatch], *, information: bool = False
) -> dict[str, float]:
    """How routers decide, by layer, from one extra forward pass of a step's micro-batches, over
    the full softmax g of each token:

    - `router_entropy`: mean of `-Σ g ln g`, in nats;
    - `router_inner`: the highest g over the next, median of a rank's micro-batch, then mean;
    - `router_outer`: mean of the summed g of the chosen experts;
    - with `information`, `router_information`: `mutual_information` with the router below, mean
      over ranks (where both are on one rank).

    All ranks call it and get the same.
    """
    sums: dict[str, tuple[float, int]] = {}
    below: dict[str, Tensor] = {}

    def add(name: str, value: Tensor | float, count: int = 1) -> None:
        total, number = sums.get(name, (0.0, 0))
        sums[name] = (total + float(value), number + count)

    def after_router(layer: int, k: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            g = output[0].flatten(0, -2).double().softmax(-1)
            top = g.topk(min(max(2, k), g.shape[1]), dim=-1).values
            label = f"{layer:02d}"
            add(f"router_entropy/{label}", -torch.xlogy(g, g).sum(), len(g))
            add(f"router_outer/{label}", top[:, :k].sum(), len(g))
            if g.shape[1] > 1:
                add(f"router_inner/{label}", (top[:, 0] / top[:, 1]).median())
            if information and "g" in below and below["g"].shape == g.shape:
                add(f"router_information/{label}", mutual_information(below["g"], g))
            below["g"] = g

        return hook

    handles = [
        mixture.router.register_forward_hook(after_router(layer, mixture.options.top_k))
        for layer, mixture in mixtures(model.parts).items()
    ]
    for part in model.parts:  # each begins another micro-batch, or other layers
        if own := mixtures([part]):
            entry = own[min(own)]
            handles.append(entry.register_forward_pre_hook(lambda *_: below.clear()))
    try:
        with torch.compiler.set_stance("force_eager"):
            model.evaluate(batches)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / count for name, (total, count) in gather_sums(sums).items()}


def mutual_information(a: Tensor, b: Tensor, bins: int = BINS) -> float:
    """Mutual information in nats of two equally shaped tensors of probabilities, whose entries
    come in pairs, from a histogram of `bins` x `bins` cells on [0, 1]."""
    cells = [(x.flatten() * bins).long().clamp_(0, bins - 1) for x in (a, b)]
    joint = torch.bincount(cells[0] * bins + cells[1], minlength=bins * bins).double()
    joint = (joint / joint.sum()).view(bins, bins)
    alone = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    known = joint > 0
    return float((joint[known] * (joint[known] / alone[known]).log()).sum())


@torch.no_grad()
def expert_similarity(model: ParallelModel) -> dict[str, float]:
    """`expert_similarity/<layer>`: mean cosine of the weights of two experts, over all pairs of a
    mixture (arXiv 2408.06793). Gathers one matrix of all experts at a time. Collective."""
    tensors, sums = model.model_tensors(), dict[str, tuple[float, int]]()
    for layer, mixture in mixtures(model.parts).items():
        products = torch.zeros((), dtype=torch.float64, device=model.ranks.device)
        for name, _ in mixture.experts.named_parameters():
            weight = tensors[f"blocks.{layer}.ffn.experts.{name}"]
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            products = products + (whole.flatten(1) @ whole.flatten(1).T).double()
        norms = products.diagonal().sqrt()
        cosines = products / (norms[:, None] * norms)
        count = len(cosines) * (len(cosines) - 1)
        if count:
            mean = float(cosines.sum() - len(cosines)) / count
            sums[f"expert_similarity/{layer:02d}"] = mean, 1
    return {name: total / count for name, (total, count) in gather_sums(sums).items()}


def router_gradients(
    model: ParallelModel, batches: Sequence[MicroBatch], valid: float
) -> dict[str, float]:
    """Norm of the gradient of all routers' parameters, from the cross-entropy alone
    (`router_grad_norm/tokens`) and, where there are any, from the auxiliary losses alone
    (`.../auxiliary`), over `valid` targets. Costs a step's forward and backward passes for each;
    clears gradients and loads. Collective."""
    weights = {"tokens": (1.0, 0.0)}
    if model.parts[0].loss_weights:
        weights["auxiliary"] = (0.0, 1.0)
    found, of_routers = {}, _of_routers(model.config)
    for source, (tokens, auxiliary) in weights.items():
        with _weighing(model.parts, tokens, auxiliary):
            norm = model.gradient_norm_over(batches, of_routers)
        found[f"router_grad_norm/{source}"] = norm / max(1, valid)
    take_loads(model.parts, model.ranks)
    return found


def _of_routers(config: ModelConfig) -> Callable[[str], bool]:
    """Whether a name is that of a router's parameter, or of one that routers share."""
    with torch.device("meta"):
        shared = tuple(f"shared.{name}." for name in MoE.shared_modules(config))
    return lambda name: ".ffn.router." in name or name.startswith(shared)


class _weighing:
    """Inside, the cross-entropy and the auxiliary losses have other weights."""

    def __init__(self, parts: Sequence[Decoder], tokens: float, auxiliary: float) -> None:
        self.parts, self.tokens, self.auxiliary = parts, tokens, auxiliary

    def __enter__(self) -> None:
        self._before = [(part.token_weight, part.loss_weights) for part in self.parts]
        for part in self.parts:
            part.token_weight = self.tokens
            part.loss_weights = {n: self.auxiliary * w for n, w in part.loss_weights.items()}

    def __exit__(self, *_: object) -> None:
        for part, before in zip(self.parts, self._before, strict=True):
            part.token_weight, part.loss_weights = before
