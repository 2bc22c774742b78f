"""The Triton kernels of the gated delta rule as they are launched, to compile without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from rondo.kernels.delta_rule.triton_calls import LARGEST_CHUNK, shape_class
from rondo.kernels.delta_rule.triton_gradients import pairs_kernel, readers_kernel
from rondo.kernels.delta_rule.triton_inverse import inverse_kernel, transform_kernel
from rondo.kernels.delta_rule.triton_key_gradients import key_gate_kernel, key_readers_kernel
from rondo.kernels.delta_rule.triton_keys import scores_kernel
from rondo.kernels.delta_rule.triton_outputs import mix_kernel
from rondo.kernels.delta_rule.triton_states import step_kernel, walk_kernel
from rondo.kernels.delta_rule.triton_tiles import HEAD, KEY
from rondo.kernels.triton_support import Compilation

OTHER_SHAPES = (
    ((32, 64), "bf16"),
    ((96, 192), "bf16"),
    ((256, 256), "bf16"),
    ((64, 128), "fp32"),
    ((256, 256), "fp32"),
)
"""Keys and values of a head, and dtypes, that are compiled besides the usual ones."""
_FLOATS = dict.fromkeys(("g", "beta", "first", "last", "dbeta", "dg", "since", "until"), "*fp32")
_SCALARS = {"ids": "*i64", "scale": "fp32", "B": "i32", "T": "i32"}
_HEADS, _GROUPS = 16, 16


def _compilation(
    name: str, kernel: Any, gate: int, dims: tuple[int, int], dtype: str = "bf16", **constants: Any
) -> Compilation:
    """With documents; `dims` are those of keys and values."""
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    sizes = {"G": _GROUPS, "H": _HEADS, "K": dims[0], "V": dims[1]}
    sizes["C"] = LARGEST_CHUNK.get(kind, 64)
    if name == "step":
        sizes["BK"] = 1 << (dims[0] - 1).bit_length()
    known = {**sizes, "GATE": gate, **constants}
    signature = dict.fromkeys(kernel.arg_names, f"*{dtype}") | _FLOATS | _SCALARS
    return Compilation(
        f"delta_rule_{name}",
        kernel,
        {n: t for n, t in signature.items() if n in kernel.arg_names},
        {n: x for n, x in known.items() if n in kernel.arg_names},
        shape_class(kind, dims[0]),
        dims=dims,
    )


def ahead_of_time() -> list[Compilation]:
    """Every kernel in the forms that use most registers and shared memory, few: they take long.
    Then those for other dimensions, and other dtypes."""
    head, key = HEAD.value, KEY.value
    usual, wide, summary, widest = (128, 128), (256, 512), (128, 256), (256, 256)
    forward: dict[str, Any] = {"REVERSE": False, "q": None, "do": None}
    # The walk of a summary: from zero, with nothing written but its end.
    alone: dict[str, Any] = forward | dict.fromkeys(("first", "states", "written"))
    usually = [
        _compilation("transform", transform_kernel, head, usual),
        _compilation("transform", transform_kernel, head, summary, "fp32"),
        _compilation("transform", transform_kernel, key, usual),
        _compilation("transform", transform_kernel, head, widest),
        _compilation("transform", transform_kernel, head, widest, "fp32"),
        _compilation("walk", walk_kernel, head, wide, REVERSE=True),
        _compilation("walk", walk_kernel, head, summary, "fp32", REVERSE=True),
        _compilation("walk", walk_kernel, head, wide, **alone),
        _compilation("walk", walk_kernel, key, usual, **alone),
        _compilation("walk", walk_kernel, key, wide, **forward),
        _compilation("walk", walk_kernel, key, widest, "fp32", **forward),
        _compilation("walk", walk_kernel, key, widest, "fp32", **alone),
        _compilation("mix", mix_kernel, head, usual, REVERSE=False, scores=None),
        _compilation("mix", mix_kernel, head, usual, REVERSE=True, scores=None, states=None),
        _compilation("mix", mix_kernel, head, widest, REVERSE=False, scores=None),
        _compilation("mix", mix_kernel, head, widest, REVERSE=True, scores=None, states=None),
        _compilation("mix", mix_kernel, key, widest, REVERSE=False),
        _compilation("mix", mix_kernel, head, usual, "fp32", REVERSE=False, scores=None),
        _compilation("mix", mix_kernel, head, widest, "fp32", REVERSE=False, scores=None),
        _compilation("mix", mix_kernel, key, usual, REVERSE=False),
        _compilation("mix", mix_kernel, key, usual, REVERSE=True, states=None),
        _compilation("mix", mix_kernel, key, widest, "fp32", REVERSE=False),
        _compilation("pairs", pairs_kernel, head, usual),
        _compilation("pairs", pairs_kernel, head, usual, "fp32"),
        _compilation("pairs", pairs_kernel, key, usual),
        _compilation("pairs", pairs_kernel, head, widest),
        _compilation("pairs", pairs_kernel, head, widest, "fp32"),
        _compilation("readers", readers_kernel, head, usual),
        _compilation("readers", readers_kernel, head, usual, "fp32"),
        _compilation("step", step_kernel, head, wide),
        _compilation("step", step_kernel, key, wide, "fp32"),
        _compilation("inverse", inverse_kernel, head, usual),
        _compilation("inverse", inverse_kernel, key, usual),
        _compilation("inverse", inverse_kernel, key, usual, "fp32"),
        _compilation("scores", scores_kernel, key, usual),
        _compilation("scores", scores_kernel, key, usual, "fp32"),
        _compilation("walk", walk_kernel, key, usual, REVERSE=True),
        _compilation("key_readers", key_readers_kernel, key, usual),
        _compilation("key_gate", key_gate_kernel, key, usual),
        _compilation("key_gate", key_gate_kernel, key, usual, "fp32"),
    ]
    others = []
    for dims, dtype in OTHER_SHAPES:
        others += [
            _compilation("walk", walk_kernel, head, dims, dtype, REVERSE=True),
            _compilation("readers", readers_kernel, head, dims, dtype),
            _compilation("key_readers", key_readers_kernel, key, dims, dtype),
        ]
    for dtype in ("bf16", "fp32"):
        others += [
            _compilation("inverse", inverse_kernel, key, widest, dtype),
            _compilation("scores", scores_kernel, key, widest, dtype),
            _compilation("key_gate", key_gate_kernel, key, widest, dtype),
            _compilation("step", step_kernel, head, usual, dtype),
        ]
    return usually + others
