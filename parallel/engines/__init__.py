"""Engines: who holds parameters, gradients and optimizer state, and steps them.

A training loop knows an engine by what `NativeEngine` has: `parts` to look at, `forward_backward`,
`update`, `evaluate`, `token_losses`, and tensors by name for checkpoints, which are the same for
all engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from rondo.errors import UserError
from rondo.models import ModelConfig
from rondo.parallel.config import ParallelConfig
from rondo.parallel.engines.native import NativeEngine, Updates
from rondo.parallel.mesh import Ranks

__all__ = ["NativeEngine", "Updates", "make_engine"]


def make_engine(
    config: ModelConfig,
    ranks: Ranks,
    parallel: ParallelConfig,
    updates: Updates,
    *,
    precision: str,
    seed: int,
    length: int,
    costs: Sequence[float] | None = None,
    compile: bool = False,
) -> NativeEngine:
    """The engine that `parallel.engine` names; the arguments are those of `ParallelModel`, and how
    steps are made. Raises UserError where the engine is not installed or refuses its options."""
    engine = NativeEngine
    if parallel.engine == "deepspeed":
        if find_spec("deepspeed") is None:
            raise UserError(
                "parallel.engine: deepspeed is not installed; "
                "DS_BUILD_OPS=0 pip install 'rondo[deepspeed]' adds it"
            )
        from rondo.parallel.engines.deepspeed import DeepSpeedEngine

        engine = DeepSpeedEngine
    elif parallel.engine == "megatron" and parallel.megatron.distributed_optimizer:
        from rondo.parallel.engines import megatron_optimizer  # takes seconds

        engine = megatron_optimizer.MegatronEngine
    return engine(
        config,
        ranks,
        parallel,
        updates,
        precision=precision,
        seed=seed,
        length=length,
        costs=costs,
        compile=compile,
    )
