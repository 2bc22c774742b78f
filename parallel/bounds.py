"""Parameters that training keeps within bounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor

from rondo.models import Decoder, Mixer


@torch.no_grad()
def keep_bounds(parts: Sequence[Decoder]) -> None:
    """Cuts parameters back to what their mixers say (`Mixer.bounds`); to be called after each
    optimizer step. Each rank does so with what it holds."""
    for mixer in (module for part in parts for module in part.modules()):
        if isinstance(mixer, Mixer):
            for name, bound in mixer.bounds().items():
                param = mixer.get_parameter(name)
                local = param.to_local() if isinstance(param, DTensor) else param
                local.clamp_(-bound, bound)
