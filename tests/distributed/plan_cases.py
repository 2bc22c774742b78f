"""What real ranks hold, measured without the planner's own recorder."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from rondo.models import ModelConfig
from rondo.parallel.build import ParallelModel
from rondo.parallel.config import ParallelConfig
from rondo.parallel.mesh import Layout, Ranks, make_mesh
from rondo.parallel.pipeline import MicroBatch
from rondo.parallel.plan.job import Job, Model
from rondo.pretrain.optim import build_optimizers
from rondo.pretrain.recipe import OptimizerConfig

LENGTH, MICRO, MICRO_BATCHES = 64, 2, 2


def job(
    layout: Layout,
    optimizer: str = "adamw",
    checkpointing: Any = "none",
    heads: int = 4,
    ep: int = 1,
    **model: Any,
) -> Job:
    """A tiny model with all sizes divisible, on a layout."""
    sizes = {"vocab_size": 256, "dim": 64, "num_layers": 4, "ffn_dim": 128}
    sizes |= {"pattern": ["gated_deltanet", "attention"], **model}
    mixers = {
        "gated_deltanet": {"num_heads": heads, "head_dim": 16},
        "attention": {"num_heads": heads},
        "hgrn2": {"head_dim": 16},
    }
    config = ModelConfig(mixers=mixers, **sizes)
    parallel = ParallelConfig(**layout._asdict(), activation_checkpointing=checkpointing, ep=ep)
    options = OptimizerConfig(name=optimizer)  # type: ignore[arg-type]
    return Job(
        Model(config, LENGTH),
        parallel,
        layout.size,
        global_batch=layout.data_size * MICRO * MICRO_BATCHES,
        micro_batch=MICRO,
        precision="float32",
        make_optimizers=lambda parts: build_optimizers(parts, options),
    )


MIXTURE = {"num_experts": 4, "router": "rmoe", "expert_dim": 32}
CASES: dict[str, tuple[Layout, str, dict[str, Any]]] = {
    "tp2 x dp_shard2": (Layout(dp_shard=2, tp=2), "muon", {}),
    "cp2 x dp_shard2": (Layout(dp_shard=2, cp=2), "adamw", {}),
    "dp_replicate2 x dp_shard2": (Layout(dp_replicate=2, dp_shard=2), "adamw", {}),
    "ep2 of dp_shard4": (
        Layout(dp_shard=4),
        "adamw",
        {"ep": 2, "pattern": ["attention+moe"], "ffns": {"moe": MIXTURE}},
    ),
}


def measure_all() -> dict[str, dict[str, float]]:
    """What `measure` finds for each of `CASES`."""
    return {name: measure(*case) for name, case in CASES.items()}


def measure(layout: Layout, optimizer: str, options: dict[str, Any]) -> dict[str, float]:
    """Bytes of this rank's parameters, gradients and optimizer state after a real step, and of
    what a real forward pass keeps for its backward pass."""
    run = job(layout, optimizer, **options)
    ranks = Ranks(dist.get_rank(), layout.size, torch.device("cpu"), make_mesh("cpu", layout))
    model = ParallelModel(
        run.model.config, ranks, run.parallel, precision="float32", seed=0, length=LENGTH
    )
    tokens = torch.ones(MICRO, LENGTH // layout.cp, dtype=torch.long)
    batch = MicroBatch(tokens, tokens, torch.zeros_like(tokens), torch.zeros_like(tokens))
    activations = _kept(model, batch)
    model.forward_backward([batch] * run.micro_batches)
    optimizers = run.make_optimizers(model.parts)
    for one in optimizers:
        one.step()
    params = list(model.parts[0].parameters())
    states = [state for one in optimizers for state in one.state.values()]
    return {
        "parameters": _bytes(params),
        "gradients": _bytes(p.grad for p in params if p.grad is not None),
        "optimizer": _bytes(
            v for state in states for v in state.values() if isinstance(v, Tensor) and v.ndim
        ),
        "activations": activations,
    }


def _kept(model: ParallelModel, batch: MicroBatch) -> int:
    """Bytes that autograd saves in a forward pass, storages counted once, parameters and the batch
    left out."""
    part, kept = model.parts[0], {}

    def pack(x: Tensor) -> Tensor:
        storage = _local(x).untyped_storage()
        kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = part(
            batch.tokens,
            segment_ids=batch.segment_ids,
            positions=batch.positions,
            return_state=False,
        )
    for known in [*part.parameters(), *batch]:
        kept.pop(_local(known).untyped_storage()._cdata, None)
    # Gathered parameters were saved too, but FSDP2 has emptied their storages by now.
    size = sum(storage.nbytes() for storage in kept.values())
    output.hidden.sum().backward()
    for param in part.parameters():
        param.grad = None
    return size


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in map(_local, tensors))
