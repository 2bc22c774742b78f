"""The Triton kernels of gated linear attention as they are launched, to compile without a GPU."""

from __future__ import annotations

from typing import Any

import triton

from rondo.kernels.linear_attention.triton_key_calls import BLOCK
from rondo.kernels.linear_attention.triton_key_gradients import key_gradients_kernel
from rondo.kernels.linear_attention.triton_key_scores import gate_sums_kernel, key_scores_kernel
from rondo.kernels.linear_attention.triton_outputs import (
    gradients_kernel,
    mix_kernel,
    score_gradients_kernel,
)
from rondo.kernels.linear_attention.triton_states import step_kernel, walk_kernel
from rondo.kernels.linear_attention.triton_tiles import HEAD, KEY
from rondo.kernels.triton_support import Compilation

OTHER_SHAPES = (((32, 64), "bf16"), ((96, 192), "bf16"), ((256, 256), "bf16"), ((64, 128), "fp32"))
"""Keys and values of a head, and dtypes, that are compiled besides 128 and 128 of bfloat16."""
_SIZES = {"B": "i32", "T": "i32"}
_STATES = dict.fromkeys(("first", "met", "last", "reach", "states", "dstates"), "*fp32")


def _compilation(
    name: str,
    kernel: Any,
    gate: int | None,
    tensors: str,
    dtype: str = "bf16",
    dims: tuple[int, int] = (128, 128),
    **constants: Any,
) -> Compilation:
    """With documents, a float32 decay and four heads a group; `tensors` are of `dtype`, `dims` are
    those of keys and values."""
    float32 = dtype == "fp32"
    signature = {
        **_SIZES,
        **_STATES,
        **dict.fromkeys(tensors.split(), f"*{dtype}"),
        "g": "*fp32",
        **dict.fromkeys(("dg", "reads", "writes"), "*fp32"),
        "ids": "*i64",
        "scale": "fp32",
    }
    sizes = {"GATE": gate, "G": 4, "H": 16, "K": dims[0], "V": dims[1], "BC": BLOCK}
    constants |= {name: size for name, size in sizes.items() if name in kernel.arg_names}
    if name == "key_scores":
        constants["BK"] = max(16, triton.next_power_of_2(dims[0]))
    if "C" in kernel.arg_names:
        constants["C"] = 32 if float32 else 64
    shape = "*" if name in ("step", "key_scores", "gate_sums") else "float32" if float32 else "half"
    full = f"linear_attention_{name}"
    return Compilation(full, kernel, signature, constants, shape, dims=dims)


def compilations() -> list[Compilation]:
    """Every kernel in the form that uses most registers and shared memory; then other dimensions,
    from the narrowest to the widest, and other dtypes."""
    head, key = HEAD.value, KEY.value
    reads, writes = "x y z out scores", "q k v do dq dk dscores scores"
    usual = [
        _compilation("walk", walk_kernel, head, reads, REVERSE=False),
        _compilation("walk", walk_kernel, key, reads, REVERSE=True),
        _compilation("mix", mix_kernel, head, reads, REVERSE=False, scores=None),
        _compilation("mix", mix_kernel, key, reads, REVERSE=True, y=None),
        _compilation("score_gradients", score_gradients_kernel, head, writes),
        _compilation("score_gradients", score_gradients_kernel, head, writes, "fp32"),
        _compilation("score_gradients", score_gradients_kernel, key, writes),
        _compilation("gradients", gradients_kernel, head, writes),
        _compilation("gradients", gradients_kernel, head, writes, "fp32"),
        _compilation("key_scores", key_scores_kernel, None, writes, "bf16", (256, 256)),
        _compilation("key_scores", key_scores_kernel, None, writes, "fp32", (256, 256)),
        _compilation("key_gradients", key_gradients_kernel, None, writes),
        _compilation("gate_sums", gate_sums_kernel, None, writes),
        _compilation("step", step_kernel, head, "q k v o"),
        _compilation("step", step_kernel, key, "q k v o"),
        _compilation("step", step_kernel, key, "q k v o", "fp32"),
    ]
    others = []
    for dims, dtype in OTHER_SHAPES:
        others += [
            _compilation("walk", walk_kernel, key, reads, dtype, dims, REVERSE=True),
            _compilation("mix", mix_kernel, head, reads, dtype, dims, REVERSE=False, scores=None),
            _compilation("gradients", gradients_kernel, head, writes, dtype, dims),
            _compilation("key_gradients", key_gradients_kernel, None, writes, dtype, dims),
        ]
    return usual + others
