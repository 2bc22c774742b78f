"""How a run is laid out over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Exchange = Literal["all_gather", "ring"]


@dataclass
class ParallelConfig:
    """Sizes of the device mesh; their product is the number of ranks."""

    pp: int = 1
    """Pipeline ranks: each holds a run of layers and hands activations on."""
    dp_replicate: int = 1
    """Groups of ranks that hold a full copy of the model each (gradients are summed)."""
    dp_shard: int = -1
    """Ranks that share one copy of parameters and optimizer state; -1 takes what is left."""
    cp: int = 1
    """Sequence-parallel ranks: each holds a contiguous part of every sequence. They share
    parameters and optimizer state like those of dp_shard."""
    cp_exchange: Exchange = "all_gather"
    """How the ranks of `cp` pass on a recurrence's state: all summaries at once (all_gather), or
    from rank to rank (ring), which sends less and waits longer."""
    tp: int = 1
    """Tensor-parallel ranks: heads, inner channels and vocabulary are divided among them."""
    ep: int = 1
    """Expert-parallel ranks: so many of the dp_shard x cp ranks divide the experts of each mixture
    among themselves, instead of sharing all of them."""
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """Order of forward and backward passes over pipeline ranks: one stage a rank (gpipe, 1f1b) or
    two (interleaved 1F1B; zero_bubble also puts off the weights' gradients)."""
    stage_costs: Literal["measured", "flops"] = "measured"
    """What makes stages equal: times measured on this machine when the run first starts, kept in
    its folder, or the FLOPs that layers count."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """'full' keeps only block inputs and recomputes the rest in the backward pass; 'selective'
    keeps the results of weight products too and recomputes what is cheap. Not with the
    zero_bubble schedule."""
