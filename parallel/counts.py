"""What mixers counted and measured in a step, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rondo.models import MIXERS, Decoder
from rondo.models.block import Block
from rondo.parallel.mesh import Ranks


@torch.no_grad()
def take_counts(parts: Sequence[Decoder], ranks: Ranks) -> dict[str, float]:
    """By name in `Mixer.counters`: the sum over layers and ranks since the last call. Collective;
    the same on every rank. Blocks that are recomputed may count twice."""
    kinds = {MIXERS[spec.mixer] for spec in parts[0].config.layers()}
    names = sorted({name for kind in kinds for name in kind.counters})
    if not names:
        return {}
    totals = dict.fromkeys(names, 0.0)
    for block in (block for part in parts for block in part.blocks.values()):
        assert isinstance(block, Block), "nn.ModuleDict forgets its element type"
        for name, buffer in block.mixer.counters.items():
            totals[name] += float(block.mixer.get_buffer(buffer))
            block.mixer.get_buffer(buffer).zero_()
    return dict(zip(names, ranks.sum(*totals.values()), strict=True))


@torch.no_grad()
def take_gauges(parts: Sequence[Decoder], ranks: Ranks) -> dict[str, float]:
    """By name in `Mixer.gauges` and layer (`newton_residual/03`): the largest value over ranks
    since the last call; and the layers that `Mixer.layer_counts` counts. Collective; the same on
    every rank."""
    specs = parts[0].config.layers()
    names = [
        (f"{name}/{layer:02d}", layer, buffer)
        for layer, spec in enumerate(specs)
        for name, buffer in MIXERS[spec.mixer].gauges.items()
    ]
    if not names:
        return {}
    blocks: dict[int, Any] = {int(i): block for part in parts for i, block in part.blocks.items()}
    nothing = torch.zeros((), device=ranks.device)
    buffers = [
        blocks[layer].mixer.get_buffer(buffer) if layer in blocks else nothing
        for _, layer, buffer in names
    ]
    largest = ranks.largest(torch.stack(buffers)).tolist()  # one transfer for all
    for buffer in buffers:
        buffer.zero_()
    found = {name: value for (name, _, _), value in zip(names, largest, strict=True)}
    kinds = {MIXERS[spec.mixer] for spec in specs}
    counted = {total: name for kind in kinds for total, name in kind.layer_counts.items()}
    return found | {
        total: float(sum(found.get(f"{name}/{layer:02d}", 0) > 0 for layer in range(len(specs))))
        for total, name in counted.items()
    }
