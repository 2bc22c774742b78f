"""Norms inside the model: what each block puts out and what each recurrence carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rondo.parallel.build import ParallelModel
from rondo.parallel.pipeline import MicroBatch


@torch.no_grad()
def layer_norms(model: ParallelModel, batches: Sequence[MicroBatch]) -> dict[str, float]:
    """Root mean squares by layer, from one extra forward pass of a step's micro-batches:
    `activation_rms/<layer>` of the residual stream after each block, and `state_rms/<layer>` of
    each recurrent state after each rank's last token. All ranks call it and get the same."""
    sums: dict[str, tuple[float, int]] = {}

    def add(name: str, x: Tensor) -> None:
        total, count = sums.get(name, (0.0, 0))
        sums[name] = (total + float(x.double().square().sum()), count + x.numel())

    def after_block(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            add(f"activation_rms/{name}", output[0])

        return hook

    def after_mixer(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if "recurrent" in output[1]:
                add(f"state_rms/{name}", output[1]["recurrent"])

        return hook

    handles = []
    for part in model.parts:
        for name, block in part.blocks.items():
            label = f"{int(name):02d}"
            handles.append(block.register_forward_hook(after_block(label)))
            mixer = block.get_submodule("mixer")
            handles.append(mixer.register_forward_hook(after_mixer(label)))
    try:
        with torch.compiler.set_stance("force_eager"):
            model.evaluate(batches)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / count) ** 0.5 for name, (total, count) in gather_sums(sums).items()}


def gather_sums(sums: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """Sums and counts by name, added up over all ranks. Collective."""
    if not dist.is_initialized():
        return sums
    of_ranks: list[dict[str, tuple[float, int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, sums)
    names = sorted({name for one in of_ranks for name in one})
    return {
        name: (
            sum(one[name][0] for one in of_ranks if name in one),
            sum(one[name][1] for one in of_ranks if name in one),
        )
        for name in names
    }
