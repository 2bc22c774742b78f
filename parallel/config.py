"""How a run is laid out over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Exchange = Literal["all_gather", "ring"]
Engine = Literal["native", "deepspeed", "megatron"]
Offload = Literal["none", "cpu", "nvme"]


@dataclass
class DeepSpeedOptions:
    """What `parallel.engine: deepspeed` does; nothing of it counts with another engine."""

    zero_stage: Literal[1, 2, 3] = 2
    """What ranks divide among themselves: optimizer state (1), gradients too (2), parameters too
    (3), as in arXiv 1910.02054."""
    offload_optimizer: Offload = "none"
    """Where optimizer state is kept and updated: on the device (none), in host memory (cpu), or,
    with ZeRO 3, on a disk (nvme; arXiv 2104.07857)."""
    offload_parameters: Offload = "none"
    """Where parameters are kept that are not in use, with ZeRO 3."""
    nvme_folder: str | None = None
    """A folder on a fast local disk, for what is kept there."""
    config: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's own keys, as {zero_optimization: {reduce_bucket_size: 50000000}}; those that
    the recipe decides are refused where they say something else."""
    config_file: str | None = None
    """A DeepSpeed JSON file of such keys; those in `config` come on top."""


@dataclass
class MegatronOptions:
    """What `parallel.engine: megatron` does beside its layers; nothing of it counts with another
    engine."""

    distributed_optimizer: bool = False
    """Megatron's DistributedDataParallel and distributed optimizer over all data ranks instead of
    FSDP2: every rank has all parameters and gradients of its part of tp, and optimizer state is
    divided (arXiv 1910.02054). On CUDA devices only."""
    overlap_grad_reduce: bool = False
    """Reduce the gradients of a bucket while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather the parameters of a bucket while the next forward pass goes on."""
    bucket_size: int | None = None
    """Parameters in a bucket at least, with overlap_grad_reduce; null for Megatron's own choice,
    the larger of 40 million and a million a data rank."""


@dataclass
class ParallelConfig:
    """Sizes of the device mesh, whose product is the number of ranks, and the engine."""

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
    engine: Engine = "native"
    """Who holds and updates parameters: torch (FSDP2), or DeepSpeed's ZeRO, which shares them out
    over dp_shard alone. 'megatron' is torch with Megatron-Core's layers over tp, and its own
    optimizer if `megatron.distributed_optimizer`."""
    deepspeed: DeepSpeedOptions = field(default_factory=DeepSpeedOptions)
    megatron: MegatronOptions = field(default_factory=MegatronOptions)
