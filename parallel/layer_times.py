"""What the layers of a model cost on this device, measured: for cutting a pipeline into stages."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from rondo.models import Decoder, ModelConfig
from rondo.models.init import initial_values

REPEATS = 3


def measure_layers(
    config: ModelConfig, length: int, dtype: torch.dtype, device: torch.device
) -> list[float]:
    """Seconds of a forward and backward pass of each layer over one sequence of `length` tokens,
    best of a few; the first layer with the embedding, the last with the final norm and the loss.
    Layers of one kind are measured once. Holds one layer at a time."""
    specs = config.layers()
    found: dict[object, float] = {}
    times = []
    for i, spec in enumerate(specs):
        kind = (spec.name, spec.ffn, i == 0, i == len(specs) - 1)
        if kind not in found:
            found[kind] = _best_seconds(_pass(config, i, length, dtype, device), device)
        times.append(found[kind])
    if device.type == "cuda":  # this was not the run's memory
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return times


def _pass(
    config: ModelConfig, layer: int, length: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """A forward and a backward pass of one layer."""
    with torch.device("meta"):
        template, part = (Decoder(config, layers=range(layer, layer + 1)) for _ in range(2))
    part.to(torch.promote_types(dtype, torch.float32)).to_empty(device=device)
    part.activation_dtype = dtype
    parameters = dict(part.named_parameters())
    with torch.no_grad():
        for buffer in part.buffers():
            buffer.zero_()
        for name, value in initial_values(template, 0):
            parameters[name].copy_(value)
    tokens = torch.randint(config.vocab_size, (1, length), device=device)
    hidden = torch.randn(1, length, config.dim, device=device, dtype=dtype, requires_grad=True)
    kind = torch.promote_types(dtype, torch.float32)
    carry = {
        name: torch.zeros(1, length, width, device=device, dtype=kind)
        for name, width in part.carried.items()
    }

    def run() -> None:
        output = part(tokens if part.first else hidden, carry=carry, return_state=False)
        result: Tensor = output.hidden.sum()
        if part.last:
            result = part.hidden_loss(output.hidden, tokens)
        result.backward()
        part.zero_grad()

    return run


def _best_seconds(run: Callable[[], None], device: torch.device) -> float:
    best = float("inf")
    for _ in range(REPEATS + 1):  # the first compiles kernels and fills caches
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best
