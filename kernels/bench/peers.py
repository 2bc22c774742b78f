"""Other packages' forms of the same operators, each imported when it is timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels import newton_rnn, nonlinear_rnn
from rondo.kernels.bench import learners

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


def _torch_gather() -> Peer:
    def run(x: Tensor, order: Tensor, places: Tensor, **_: Tensor) -> Tensor:
        return x.index_select(0, order // places.shape[1])

    return run


def _torch_combine() -> Peer:
    def run(y: Tensor, weights: Tensor, order: Tensor, places: Tensor, **_: Tensor) -> Tensor:
        rows = y * weights.flatten()[order].unsqueeze(1).to(y.dtype)
        return y.new_zeros(len(places), y.shape[1]).index_add(0, order // places.shape[1], rows)

    return run


def _megablocks_gather() -> Peer:
    gather = _load("megablocks.ops", "gather")

    def run(x: Tensor, order: Tensor, places: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        return gather(x, order.int(), experts.int(), ends.int(), places.shape[1])

    return run


def _megablocks_combine() -> Peer:
    scatter = _load("megablocks.ops", "scatter")

    def run(
        y: Tensor, weights: Tensor, order: Tensor, places: Tensor, experts: Tensor, ends: Tensor
    ) -> Tensor:
        shares = weights.flatten().to(y.dtype)
        return scatter(y, order.int(), experts.int(), shares, ends.int(), places.shape[1])

    return run


def _torch_products() -> Peer:
    """torch's grouped product with torch's own backward pass."""
    return lambda x, weight, ends: F.grouped_mm(x, weight.mT, offs=ends)


def _loop_products() -> Peer:
    """A product an expert, whose sizes the host waits for."""

    def run(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        parts = zip(x.split(sizes), weight.unbind(), strict=True)
        return torch.cat([rows @ matrix.mT for rows, matrix in parts])

    return run


def _grouped_gemm() -> Peer:
    multiply = _load("grouped_gemm.ops", "gmm")

    def run(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        sizes = ends.diff(prepend=ends.new_zeros(1)).long().cpu()  # it wants them there
        return multiply(x, weight, sizes, trans_b=True)

    return run


LONGEST_LOOP = 2048
"""Positions that a loop of small operators is timed with: it takes seconds."""


def _loop(cell: str) -> Callable[[], Peer]:
    """One position after another by torch's operators and autograd."""

    def run(gates: Tensor, recurrent: Tensor) -> Tensor:
        if gates.shape[1] > LONGEST_LOOP:
            raise ValueError(f"not timed beyond {LONGEST_LOOP} positions")
        return nonlinear_rnn(cell, gates, recurrent, backend="reference")[0]

    return lambda: run


def _torch_lstm() -> Peer:
    """torch's own, which on a GPU is cuDNN's. It makes the product of the inputs as well, here with
    the identity."""
    found: dict[torch.device, tuple[torch.nn.LSTM, Tensor]] = {}

    def run(gates: Tensor, recurrent: Tensor) -> Tensor:
        width, dim = gates[0, 0].numel(), gates.shape[-1]
        if gates.device not in found:
            like = {"device": gates.device, "dtype": gates.dtype}
            layer = torch.nn.LSTM(width, dim, bias=False, batch_first=True, **like)
            found[gates.device] = layer, torch.eye(width, **like)
        layer, identity = found[gates.device]
        weights = {"weight_ih_l0": identity, "weight_hh_l0": recurrent.reshape(width, dim)}
        h, _ = torch.func.functional_call(layer, weights, (gates.flatten(2),))
        return h.unsqueeze(2)

    return run


def _flashrnn(cell: str) -> Callable[[], Peer]:
    def load() -> Peer:
        scan = _load("flashrnn", "flashrnn")

        def run(gates: Tensor, recurrent: Tensor) -> Tensor:
            bias = gates.new_zeros(recurrent.shape[:3])
            return scan(gates, recurrent, bias, function=cell, dtype="bfloat16")[0][0]

        return run

    return load


def _chunked(run: Callable[..., Tensor]) -> Callable[[], Peer]:
    """Our own form of torch's operators, where nobody else has the operator."""
    return lambda: lambda **inputs: run(**inputs, backend="chunked")


def _newton(cell: str, **inputs: Any) -> Tensor:
    return newton_rnn(cell, **inputs).h


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
    "gather_rows": {"torch": _torch_gather, "megablocks": _megablocks_gather},
    "combine_rows": {"torch": _torch_combine, "megablocks": _megablocks_combine},
    "expert_products": {
        "torch": _torch_products,
        "loop": _loop_products,
        "grouped_gemm": _grouped_gemm,
    },
    "lstm": {"torch": _torch_lstm, "loop": _loop("lstm"), "flashrnn": _flashrnn("lstm")},
    "slstm": {"loop": _loop("slstm"), "flashrnn": _flashrnn("slstm")},
    "para_gru": {"chunked": _chunked(_newton)},
    "para_lstm": {"chunked": _chunked(_newton)},
    "fast_weights": {"chunked": _chunked(learners.fast)},
    "neural_memory": {"chunked": _chunked(learners.memory)},
}
"""Operator -> package -> function that imports it and returns what is called with our inputs, by
their names here. An ImportError means that the package is not there."""
