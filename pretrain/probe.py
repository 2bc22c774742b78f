"""Norms inside the model: what each block puts out and what each recurrence carries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rondo.models import Decoder


@torch.no_grad()
def layer_norms(model: Decoder, tokens: Tensor, segment_ids: Tensor) -> dict[str, float]:
    """Root mean squares by layer, from one extra forward pass: `activation_rms/<layer>` of the
    residual stream after each block, and `state_rms/<layer>` of each recurrent state after the
    last token. `tokens`, `segment_ids`: `(B, T)`."""
    found: dict[str, Tensor] = {}

    def after_block(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[f"activation_rms/{name}"] = _rms(output[0])

        return hook

    def after_mixer(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if "recurrent" in output[1]:
                found[f"state_rms/{name}"] = _rms(output[1]["recurrent"])

        return hook

    handles = []
    for i, block in enumerate(model.blocks):
        handles.append(block.register_forward_hook(after_block(f"{i:02d}")))
        handles.append(block.get_submodule("mixer").register_forward_hook(after_mixer(f"{i:02d}")))
    try:
        with torch.compiler.set_stance("force_eager"):
            model(tokens, segment_ids=segment_ids, return_state=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(value) for name, value in found.items()}


def _rms(x: Tensor) -> Tensor:
    return x.float().square().mean().sqrt()
