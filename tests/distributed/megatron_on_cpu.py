"""Megatron's data parallel on CPU tensors.

Its code names the device "cuda" and compares types with "torch.cuda.FloatTensor". Here it finds
these names, and CPU tensors behind them; what it computes and sends is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rondo.parallel.engines import megatron_optimizer
from rondo.parallel.engines.megatron_optimizer import MegatronEngine


class CudaNames(TorchFunctionMode):
    """Makes tensors of the device "cuda" on the CPU, and calls types of CPU tensors by the names
    that they would have on CUDA."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        out = func(*args, **kwargs)
        if func is Tensor.type and isinstance(out, str):
            return out.replace("torch.", "torch.cuda.", 1)
        return out


class OnCpu(MegatronEngine):
    """Megatron's data parallel on the ranks' CPUs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        with CudaNames(), mock.patch("torch.cuda.current_device", lambda: "cpu"):
            super().__init__(*args, **options)

    @staticmethod
    def _check_device(device: torch.device) -> None:
        pass

    def update(self, valid: float) -> float:
        with CudaNames():
            return super().update(valid)


def on_cpu() -> Any:
    """Inside, `parallel.megatron.distributed_optimizer` runs on CPUs."""
    return mock.patch.object(megatron_optimizer, "MegatronEngine", OnCpu)
