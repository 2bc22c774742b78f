"""What mixers counted in a step, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

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
