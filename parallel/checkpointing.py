"""Activation checkpointing: what blocks keep for their backward pass, and what they recompute."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed._composable import checkpoint
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Products with weights, and fused attention: most of the FLOPs, little of the memory.
KEPT = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._grouped_mm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def checkpoint_block(block: nn.Module, mode: str) -> None:
    """Makes `block` recompute its activations: all of them ("full"; arXiv 1604.06174), or all but
    the results of weight products ("selective"; arXiv 2205.05198). "none" changes nothing."""
    if mode == "full":
        checkpoint(block)
    elif mode == "selective":
        context = functools.partial(create_selective_checkpoint_contexts, _policy)
        checkpoint(block, context_fn=context)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
