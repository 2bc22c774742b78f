"""What mixers counted in a step, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rondo.models import MIXERS, Decoder, Mixer
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
    for mixer in (m for part in parts for m in part.modules() if isinstance(m, Mixer)):
        for name, buffer in mixer.counters.items():
            totals[name] += float(mixer.get_buffer(buffer))
            mixer.get_buffer(buffer).zero_()
    return dict(zip(names, ranks.sum(*totals.values()), strict=True))
