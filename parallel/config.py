"""How a run is laid out over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ParallelConfig:
    """Sizes of the device mesh; their product is the number of ranks."""

    dp_replicate: int = 1
    """Groups of ranks that hold a full copy of the model each (gradients are averaged)."""
    dp_shard: int = -1
    """Ranks that share one copy of parameters and optimizer state; -1 takes what is left."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """'full' keeps only block inputs and recomputes the rest in the backward pass."""
