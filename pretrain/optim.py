"""Optimizers from a recipe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from rondo.models import Decoder
from rondo.parallel.engines import Updates
from rondo.parallel.muon import ShardedMuon
from rondo.pretrain.recipe import OptimizerConfig, Recipe


def build_optimizers(parts: Sequence[Decoder], config: OptimizerConfig) -> list[Optimizer]:
    """AdamW alone, or Muon (arXiv 2502.16982) for the matrices of the blocks and AdamW for the
    rest, of all `parts` of a model. Matrices decay, vectors do not. Each group remembers its peak
    as `peak_lr`."""
    matrices: list[nn.Parameter] = []
    groups: dict[tuple[bool, DeviceMesh | None], list[nn.Parameter]] = {}
    for part in parts:
        whole = part.float32_names()  # decays and steps in logarithms: 0 is nothing special
        matrix_names = part.matrix_names()
        with torch.device("meta"):  # an engine may hold parameters in another form
            shapes = Decoder(part.config, layers=part.layers).named_parameters()
            dims = {name: param.ndim for name, param in shapes}
        for name, param in part.named_parameters():
            if not param.requires_grad:
                continue
            if config.name == "muon" and name in matrix_names:
                matrices.append(param)
            else:
                # A fused update takes tensors of one device mesh at a time.
                mesh = param.device_mesh if isinstance(param, DTensor) else None
                decays = name in matrix_names or (dims[name] >= 2 and name not in whole)
                groups.setdefault((decays, mesh), []).append(param)
    optimizers: list[Optimizer] = [
        AdamW(
            [
                {"params": params, "weight_decay": config.weight_decay if decays else 0.0}
                for (decays, _), params in groups.items()
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
    ]
    if matrices:
        optimizers.append(
            ShardedMuon(
                matrices,
                lr=config.lr,
                weight_decay=config.weight_decay,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def updates_of(recipe: Recipe, data_size: int) -> Updates:
    """How an engine makes the steps of `recipe` on `data_size` data-parallel ranks."""
    data = recipe.data
    return Updates(
        make_optimizers=lambda parts: build_optimizers(parts, recipe.optimizer),
        clip_norm=recipe.optimizer.clip_norm,
        micro_batch=data.micro_batch_size,
        accumulation=data.global_batch_size // (data.micro_batch_size * data_size),
    )


def set_learning_rate(optimizers: list[Optimizer], factor: float) -> None:
    """Sets every group to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
