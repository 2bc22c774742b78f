"""What ranks run in test_layout_checkpoints.py."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from rondo.models import Decoder
from rondo.parallel.build import ParallelModel
from rondo.parallel.checkpoint import (
    Checkpointer,
    copy_to_twins,
    model_tensors,
    optimizer_tensors,
    state_digest,
)
from rondo.parallel.config import ParallelConfig
from rondo.parallel.mesh import Ranks, make_mesh
from rondo.pretrain.optim import build_optimizers
from rondo.pretrain.recipe import OptimizerConfig
from rondo.tests.distributed.parity_cases import Run, micro_batches
from rondo.tests.toys import registered


def check_twins(model: ParallelModel, optimizers: list[torch.optim.Optimizer]) -> None:
    """Stages of this rank that hold the same parameter agree on it and on its optimizer state."""
    first, *others = [dict(part.named_parameters()) for part in model.parts]
    for other in others:
        for name in first.keys() & other.keys():
            assert torch.equal(first[name], other[name]), name
            states = [each.state for each in optimizers if first[name] in each.state]
            assert states or not first[name].requires_grad, f"{name} has no optimizer state"
            for state in states:
                for key, value in state[first[name]].items():
                    assert torch.equal(value, state[other[name]][key]), f"{name}.{key}"


def save_or_load(run: Run, folder: str, optimizer: str, seed: int, save: bool) -> str:
    """Digest of model and optimizer: after two steps, which are saved, or after loading them into
    a model of other values and the other part of the same step."""
    with registered():
        mesh = make_mesh("cpu", run.layout) if dist.is_initialized() else None
        rank, size = (dist.get_rank(), dist.get_world_size()) if mesh is not None else (0, 1)
        ranks = Ranks(rank, size, torch.device("cpu"), mesh)
        parallel = ParallelConfig(pipeline_schedule=run.schedule, ep=run.ep)
        model = ParallelModel(
            run.config, ranks, parallel, precision=run.precision, seed=seed, length=run.time
        )
        optimizers = build_optimizers(model.parts, OptimizerConfig(name=optimizer, lr=0.01))
        checkpointer = Checkpointer(Path(folder), keep=0, asynchronous=save)
        if save:
            for _ in range(2):
                model.forward_backward(micro_batches(run, ranks))
                for each in optimizers:
                    each.step()
                    each.zero_grad()
        tensors = {
            "model": model_tensors(model.parts),
            "optimizer": optimizer_tensors(model.parts, optimizers),
        }
        before = state_digest(tensors)
        if save:
            checkpointer.save(2, tensors, {})
        else:
            path = checkpointer.newest()
            assert path is not None, "nothing was saved"
            with torch.device("meta"):
                optional = Decoder(run.config).optional_names()
            changes = checkpointer.changes(path, tensors, optional)
            checkpointer.load(path, changes.stored(tensors), dropped=changes.dropped)
            copy_to_twins(model.parts, optimizers)
            assert state_digest(tensors) != before
            check_twins(model, optimizers)
        checkpointer.close()
        return state_digest(tensors)
