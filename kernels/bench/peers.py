"""Other packages' forms of the same operators, each imported when it is timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Peer = Callable[..., Any]


def _load(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(module), name)


def _fla(module: str, name: str, **renamed: str) -> Callable[[], Peer]:
    """A function of flash-linear-attention that takes our inputs under their names there."""

    def load() -> Peer:
        function = _load(f"fla.{module}", name)

        def run(**inputs: Tensor) -> Any:
            result = function(**{renamed.get(key, key): value for key, value in inputs.items()})
            return result[0] if isinstance(result, tuple) else result

        return run

    return load


def _fla_scan() -> Peer:
    chunk_hgrn = _load("fla.ops.hgrn", "chunk_hgrn")
    return lambda g, x: chunk_hgrn(x, g)[0]


def _fla_conv() -> Peer:
    convolve = _load("fla.modules.convolution", "causal_conv1d")
    return lambda x, weight: convolve(x=x, weight=weight, activation="silu")[0]


def _fla_norm() -> Peer:
    norm = _load("fla.modules.layernorm", "rms_norm")
    return lambda x, weight: norm(x, weight, None, eps=1e-6)


def _fla_gated_norm() -> Peer:
    norm = _load("fla.modules.fused_norm_gate", "rms_norm_gated")
    return lambda x, gate, weight: norm(x, gate, weight, None, activation="swish", eps=1e-6)


def _fla_loss() -> Peer:
    loss = _load("fla.modules.fused_linear_cross_entropy", "fused_linear_cross_entropy_loss")
    return lambda hidden, weight, targets: loss(hidden, targets, weight)


def _liger_loss() -> Peer:
    loss = _load("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    return lambda hidden, weight, targets: loss(hidden, weight, targets)


def _liger_norm() -> Peer:
    norm = _load("liger_kernel.transformers.functional", "liger_rms_norm")
    return lambda x, weight: norm(x, weight, 1e-6)


def _causal_conv1d() -> Peer:
    convolve = _load("causal_conv1d", "causal_conv1d_fn")

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return convolve(x.transpose(1, 2), weight, activation="silu").transpose(1, 2)

    return run


def _mamba() -> Peer:
    """Mamba-2's scan with steps of 1 and the decay in A, which it takes one a head: what is timed
    is its work, not the same numbers."""
    scan = _load("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        rate = -g.detach().new_ones(v.shape[2])
        return scan(v, -g, rate, k, q, 256)

    return run


def _torch_norm() -> Peer:
    return lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6)


def _sdpa() -> Peer:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def _flash() -> Peer:
    attend = _load("flash_attn", "flash_attn_func")
    return lambda q, k, v: attend(q, k, v, causal=True)


PEERS: dict[str, dict[str, Callable[[], Peer]]] = {
    "rms_norm": {"torch": _torch_norm, "fla": _fla_norm, "liger": _liger_norm},
    "gated_rms_norm": {"fla": _fla_gated_norm},
    "linear_scan": {"fla": _fla_scan},
    "short_conv": {"fla": _fla_conv, "causal_conv1d": _causal_conv1d},
    "linear_cross_entropy": {"fla": _fla_loss, "liger": _liger_loss},
    "linear_attention": {"fla": _fla("ops.simple_gla", "chunk_simple_gla")},
    "linear_attention_head_decay": {
        "fla": _fla("ops.simple_gla", "chunk_simple_gla"),
        "mamba_ssm": _mamba,
    },
    "linear_attention_key_decay": {"fla": _fla("ops.gla", "chunk_gla")},
    "delta_rule": {"fla": _fla("ops.delta_rule", "chunk_delta_rule")},
    "delta_rule_head_decay": {"fla": _fla("ops.gated_delta_rule", "chunk_gated_delta_rule")},
    "delta_rule_key_decay": {"fla": _fla("ops.kda", "chunk_kda")},
    "attention": {"sdpa": _sdpa, "flash_attn": _flash},
}
"""Operator -> package -> function that imports it and returns what is called with our inputs, by
their names here. An ImportError means that the package is not there."""
