"""Attention by the flash-attn package (CUDA, float16 or bfloat16).

Version 2 is the module `flash_attn`; version 3, for Hopper GPUs, is `flash_attn_interface`. The
keywords used here mean the same in both. By default their backward pass adds up in any order; a
run that is killed and goes on bit by bit needs `deterministic`, which takes more time and memory.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels.backend import is_hopper

HALF = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


def flash_refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why flash-attn cannot take these inputs, or None."""
    if q.device.type != "cuda":
        return f"it needs CUDA tensors, got {q.device.type}"
    if not (q.dtype == k.dtype == v.dtype and q.dtype in HALF):
        return f"it needs float16 or bfloat16 alike, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > MAX_HEAD_DIM:
        return (
            f"it needs equal head dims of at most {MAX_HEAD_DIM}, "
            f"got {q.shape[-1]} for q and {v.shape[-1]} for v"
        )
    return _absence(is_hopper(q.device))


@torch.compiler.assume_constant_result
def _package(hopper: bool) -> str:
    """Name of the module to call."""
    return _find(hopper)[0]


@torch.compiler.assume_constant_result
def _absence(hopper: bool) -> str | None:
    """Why that module cannot be called, or None."""
    return _find(hopper)[1]


@functools.cache
def _find(hopper: bool) -> tuple[str, str | None]:
    """Version 3 where it is installed and the GPU is one of its kind, else version 2; and what
    is wrong with it, or None."""
    for name in ("flash_attn_interface", "flash_attn") if hopper else ("flash_attn",):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except ImportError as error:
            return name, f"{name} is installed but cannot be imported: {error}"
        return name, None
    return "flash_attn", "it is not installed: pip install flash-attn --no-build-isolation"


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    segment_ids: Tensor | None,
    key_segment_ids: Tensor | None,
) -> Tensor:
    """See `attention`. Documents run as variable-length sequences, never as masks.

    Raises:
        ValueError: the inputs are none that flash-attn takes, or it is not installed.
    """
    reason = flash_refusal(q, k, v)
    if reason is not None:
        raise ValueError(f"attention: backend 'flash' cannot run: {reason}")
    package: Any  # by statements, through which torch.compile sees
    if _package(is_hopper(q.device)) == "flash_attn":
        import flash_attn as package
    else:
        import flash_attn_interface as package
    # flash-attn counts the keys to the left of a query, without the query itself, and aligns
    # queries with the last keys.
    left = -1 if window is None else window - 1
    options: dict[str, Any] = {"softmax_scale": scale, "causal": True, "window_size": (left, 0)}
    options["deterministic"] = True
    if segment_ids is None or key_segment_ids is None:
        return package.flash_attn_func(q, k, v, **options)
    query_bounds, key_bounds = _bounds(segment_ids, key_segment_ids)
    out = package.flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q=query_bounds,
        cu_seqlens_k=key_bounds,
        max_seqlen_q=q.shape[1],
        max_seqlen_k=k.shape[1],
        **options,
    )
    return out.view(*q.shape[:3], v.shape[-1])


def _bounds(segment_ids: Tensor, key_segment_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative lengths `(documents + 1,)` int32 of queries and of keys over the flattened batch.

    Documents are those of the keys; one that lies wholly in the cache has no queries.
    """
    batch, keys = key_segment_ids.shape
    starts = torch.ones_like(key_segment_ids, dtype=torch.bool)
    starts[:, 1:] = key_segment_ids[:, 1:] != key_segment_ids[:, :-1]
    first = starts.flatten().nonzero().squeeze(1)
    key_bounds = F.pad(first, (0, 1), value=batch * keys)
    # A query's document is that of its key position; count the queries before each bound.
    is_query = torch.zeros_like(key_segment_ids)
    is_query[:, keys - segment_ids.shape[1] :] = 1
    before = F.pad(is_query.flatten().cumsum(0), (1, 0))
    return before[key_bounds].int(), key_bounds.int()
