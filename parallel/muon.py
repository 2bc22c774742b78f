"""Muon over sharded matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Muon
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from rondo.parallel.data_parallel import local_part


class ShardedMuon(Muon):
    """`torch.optim.Muon` that gathers each sharded matrix once a step to orthogonalise it.

    Torch's own runs the fifteen products of the Newton-Schulz iteration on shards, with a
    collective each, and fails on matrices with fewer rows than ranks. The state (a momentum
    buffer per matrix) and the update are the same; buffers stay sharded.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of all matrices that have a gradient; `closure` is not supported."""
        if closure is not None:
            raise ValueError("ShardedMuon.step takes no closure")
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            buffers: list[Tensor] = []
            self._init_group(group, params, grads, buffers)
            for param, grad, buffer in zip(params, grads, buffers, strict=True):
                buffer.lerp_(grad, 1 - group["momentum"])
                update = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
                update = _orthogonalise(update, group)
                lr = _adjust_lr(group["lr"], group["adjust_lr_fn"], param.shape)
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update, alpha=-lr)


def _orthogonalise(update: Tensor, group: dict[str, Any]) -> Tensor:
    whole = update.full_tensor() if isinstance(update, DTensor) else update
    whole = _zeropower_via_newtonschulz(
        whole, group["ns_coefficients"], group["ns_steps"], group["eps"]
    )
    if not isinstance(update, DTensor):
        return whole
    # Every rank has the whole result: each cuts out its part without communication.
    part = local_part(whole.to(update.dtype), update.device_mesh, update.placements).contiguous()
    return DTensor.from_local(
        part,
        update.device_mesh,
        update.placements,
        run_check=False,
        shape=update.shape,
        stride=update.stride(),
    )
