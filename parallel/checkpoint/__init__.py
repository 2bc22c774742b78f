"""Checkpoints: asynchronous, atomic, checksummed, readable under any layout."""

from rondo.parallel.checkpoint.changes import Changes
from rondo.parallel.checkpoint.checkpointer import STATE, Checkpointer
from rondo.parallel.checkpoint.collective import CheckpointError
from rondo.parallel.checkpoint.state import (
    copy_to_twins,
    model_tensors,
    optimizer_tensors,
    state_digest,
)

__all__ = [
    "STATE",
    "Changes",
    "CheckpointError",
    "Checkpointer",
    "copy_to_twins",
    "model_tensors",
    "optimizer_tensors",
    "state_digest",
]
