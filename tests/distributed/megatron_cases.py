"""Runs under Megatron's data parallel, on the ranks that are there."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from rondo.parallel.build import ParallelModel
from rondo.parallel.config import MegatronOptions, ParallelConfig
from rondo.parallel.engines import NativeEngine, Updates, make_engine
from rondo.parallel.mesh import Ranks, make_mesh
from rondo.pretrain.optim import build_optimizers
from rondo.pretrain.recipe import OptimizerConfig
from rondo.tests.distributed.engine_cases import KilledTrainer, Rows, run
from rondo.tests.distributed.megatron_on_cpu import on_cpu
from rondo.tests.distributed.parity_cases import STEPS, Run, data, micro_batches

DENSE = ["--model.pattern=[gated_deltanet, para_gru]", "--model.ffns={}"]
"""Matrices, float32 vectors, and parameters that are kept within bounds."""
WEIGHED = "--reweight.strategy=linear"
MEGATRON = ["--parallel.engine=megatron", "--parallel.megatron.distributed_optimizer=true"]
OVERLAP = [
    "--parallel.megatron.overlap_grad_reduce=true",
    "--parallel.megatron.overlap_param_gather=true",
    "--parallel.megatron.bucket_size=2000",
]
BF16 = ["--precision=bfloat16", "--steps=14"]


def scenarios(folder: str) -> dict[str, Rows]:
    """The same run under both engines, cut and not; rows by what was done."""

    def after_10(name: str) -> str:
        return f"--checkpoint.resume={folder}/runs/{name}/checkpoints/step-000000010"

    def go(name: str, *options: str, kind: Any = None) -> Rows:
        return run(folder, name, *DENSE, *options, **({"kind": kind} if kind else {}))

    found = {"native": go("native", WEIGHED), "native bf16": go("native-bf16", *BF16)}
    with on_cpu():
        for key, options in (("float32", [WEIGHED, *OVERLAP]), ("bf16", BF16)):
            found[f"before {key}"] = go(key, *MEGATRON, *options, kind=KilledTrainer)
            found[key] = go(key, *MEGATRON, *options)
        found["from native"] = go("from-native", *MEGATRON, WEIGHED, after_10("native"))
    found["bf16 to native"] = go("bf16-to-native", *BF16, after_10("bf16"))
    return found


def steps(run: Run, options: MegatronOptions) -> dict[str, Any]:
    """A few steps in float32; then losses, norms, and all tensors of a checkpoint, whole, also
    after gradients that are no numbers; how many moments this rank holds."""
    rank, size, mesh = 0, 1, None
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        mesh = make_mesh("cpu", run.layout)
    ranks = Ranks(rank, size, torch.device("cpu"), mesh)
    updates = Updates(
        lambda parts: build_optimizers(parts, OptimizerConfig(lr=1e-3, eps=1e-2)), 0.5, 1, 1
    )
    with on_cpu():
        engine = make_engine(
            run.config,
            ranks,
            ParallelConfig(tp=run.layout.tp, engine=run.engine, megatron=options),
            updates,
            precision="float32",
            seed=4,
            length=run.time,
        )
    batches, valid = micro_batches(run, ranks), int((data(run).targets >= 0).sum())
    result: dict[str, Any] = {"losses": [], "norms": []}
    for _ in range(STEPS):
        nats = engine.forward_backward(batches)
        result["losses"].append(ranks.sum(float(nats) * ranks.counts)[0] / valid)
        result["norms"].append(engine.update(valid))
    result["tensors"] = whole_tensors(engine)
    backward = engine._backward
    engine._backward = lambda loss: backward(loss * float("nan"))
    engine.forward_backward(batches)
    result["spoiled norm"] = engine.update(valid)
    result["spoiled"] = whole_tensors(engine)
    # What has been filled with a checkpoint's tensors gives the same tensors.
    tensors = engine.tensors()
    engine.take_in(tensors)
    result["again"] = whole_tensors(engine)
    held = [state["exp_avg"].numel() for opt in engine.optimizers for state in opt.state.values()]
    return result | {"held": sum(held)}


def both(run: Run) -> list[dict[str, Any]]:
    """`steps` of Megatron's data parallel, one after the other and overlapped."""
    options = MegatronOptions(distributed_optimizer=True)
    overlapped = dataclasses.replace(
        options, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=500
    )
    return [steps(run, options), steps(run, overlapped)]


def whole_tensors(engine: NativeEngine | ParallelModel) -> dict[str, Any]:
    return {
        f"{part}/{name}": (x.full_tensor() if isinstance(x, DTensor) else x).detach().numpy().copy()
        for part, tensors in engine.tensors().items()
        for name, x in tensors.items()
    }
