"""What a run says of itself when it begins and when it ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rondo.models import Decoder, ModelConfig
from rondo.models.mixer import Cost
from rondo.parallel.checkpoint import state_digest
from rondo.pretrain.data import unigram_bits_per_byte
from rondo.pretrain.data.repeats import check_epochs, describe, warnings


def greeting(run: Any) -> Iterator[str]:
    """Sizes and costs of the model, the layout, what the data is worth. `run`: its `Trainer`.
    Raises UserError where it would read a source more often than the recipe allows."""
    cost, layout = run.cost, run.ranks.layout
    used = active_parameters(run.config)
    active = f" ({used:,} active)" if used < cost.parameters else ""
    shape = " x ".join(f"{name} {n}" for name, n in layout._asdict().items() if n > 1)
    yield (
        f"{run.recipe.name}: {cost.parameters:,} parameters{active}, "
        f"{cost.flops / 1e6:,.1f} MFLOP a token forward, "
        f"{cost.state_bytes / 2**20:,.2f} MiB of state a sequence, "
        f"{run.tokens_per_step:,} tokens a step on {run.ranks.size} rank(s)"
        f"{f' ({shape})' if shape else ''}, {run.peak_flops / 1e9:,.0f} GFLOP/s of matrix "
        "products"
    )
    yield from run.reweighting.notes(run.config.vocab_size)
    repeats = run.training.repeats(run.reweighting.domains)
    check_epochs(repeats, run.recipe.data.max_epochs)
    yield from describe(repeats)
    yield from warnings(repeats, cost.parameters)


def farewell(run: Any, validation: Mapping[str, float]) -> Iterator[str]:
    """The digest of the model, and what it makes of held-out text. Collective."""
    digest = state_digest({"model": run.model.model_tensors()})
    yield f"model digest after step {run.state['step']}: {digest}"
    held_out = run.observer.held_out
    if run.recipe.stages:
        for name in held_out:
            yield f"validation of {name}: {scores(validation, f'validation/{name}')}"
    elif held_out and run.ranks.rank == 0:
        size = run.recipe.data.global_batch_size * run.recipe.evals.batches
        targets = (held_out[""].batch([i]).targets for i in range(size))
        own = run.training.parts[0].own
        before = run.state["first_bits_per_byte"]
        known = "" if before is None else f"{before:.3f} before, "
        compared = ""
        if not own.streamed():  # whose tokens nobody has counted
            lengths = run.batches.byte_lengths
            unigram = unigram_bits_per_byte(own.token_counts(), targets, lengths)
            compared = f" (a token-unigram model of the training data: {unigram:.3f})"
        yield (
            f"validation bits per byte: {known}{validation['validation/bits_per_byte']:.3f} after "
            f"training{compared}"
        )


def scores(values: Mapping[str, float], name: str = "validation") -> str:
    """Bits per byte and loss of what `name` stands for."""
    return f"{values[f'{name}/bits_per_byte']:.3f} bits per byte, loss {values[f'{name}/loss']:.3f}"


def model_cost(config: ModelConfig, length: int) -> Cost:
    """What the whole model costs, in sequences of `length` tokens."""
    with torch.device("meta"):
        return Decoder(config).cost(length)


def active_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model that take part in one token's forward pass."""
    with torch.device("meta"):
        return Decoder(config).active_parameters()
