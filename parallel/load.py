"""What routers did in a step: the load of every expert, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rondo.models import Decoder
from rondo.models.ffn.moe import MoE, mixture_layers, moe_options
from rondo.parallel.mesh import Ranks


def mixtures(parts: Sequence[Decoder]) -> dict[int, MoE]:
    """The mixtures of experts of this rank, by layer."""
    return {
        int(layer): module
        for part in parts
        for layer, block in part.blocks.items()
        for module in block.modules()
        if isinstance(module, MoE)
    }


@torch.no_grad()
def take_loads(parts: Sequence[Decoder], ranks: Ranks) -> dict[int, Tensor]:
    """By layer, `(N + 1,)` float64: how often each expert was chosen in training since the last
    call, over all ranks, and how many of these choices were dropped. Collective; the same on every
    rank. Blocks that are recomputed may count twice: only shares mean something then."""
    config = parts[0].config
    layers = mixture_layers(config)
    if not layers:
        return {}
    here = mixtures(parts)
    width = moe_options(config).num_experts + 1
    counts = torch.zeros(len(layers), width, dtype=torch.float64)
    for row, layer in enumerate(layers):
        if layer in here and ranks.index("tp") == 0:  # tensor-parallel ranks choose alike
            counts[row] = here[layer].load.cpu()
    for mixture in here.values():
        mixture.load.zero_()
    total = torch.tensor(ranks.sum(*counts.flatten().tolist()), dtype=torch.float64)
    return dict(zip(layers, total.view(counts.shape), strict=True))


@torch.no_grad()
def move_biases(parts: Sequence[Decoder], loads: dict[int, Tensor]) -> None:
    """Moves each expert's bias in the choice by `bias_rate` towards an even load
    (arXiv 2408.15664), unless routers are frozen."""
    for layer, mixture in mixtures(parts).items():
        if mixture.balance_bias is not None and not mixture.options.freeze_router:
            chosen = loads[layer][:-1]
            towards = (chosen.mean() - chosen).sign().to(mixture.balance_bias)
            mixture.balance_bias.add_(towards, alpha=mixture.options.bias_rate)


def load_summary(loads: dict[int, Tensor]) -> dict[str, float]:
    """`moe/drop_ratio`, the share of choices that were dropped, and `moe/max_load`, the largest
    load of an expert over the even one, in the worst layer."""
    if not loads:
        return {}
    table = torch.stack(list(loads.values()))
    chosen, dropped = table[:, :-1], table[:, -1]
    even = chosen.mean(1).clamp_min(1e-9)
    return {
        "moe/drop_ratio": float(dropped.sum() / chosen.sum().clamp_min(1)),
        "moe/max_load": float((chosen.max(1).values / even).max()),
    }


def load_shares(loads: dict[int, Tensor]) -> list[list[float]]:
    """For each mixture, from the lowest, the share of choices that went to each expert."""
    chosen = [counts[:-1] for counts in loads.values()]
    return [(counts / counts.sum().clamp_min(1)).tolist() for counts in chosen]
