"""What is left of the first token in a state: heads that have not learnt to forget.

Where S_t = M_t S_{t-1} + write_t, the first token's part of a state is `M_t ... M_2 S_1`; its norm
over that of S_1 is the product of the decays, where they are numbers. A head that keeps more than a
half at the length in training did not have to forget there (state collapse, arXiv 2410.07145).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rondo.models import Decoder
from rondo.models.decoder import DecoderState
from rondo.models.mixer import Mixer, State

KEPT = 0.5
"""The share of a state at the length in training from which on a head counts as not forgetting."""
_PIECE = 1024


def is_linear(mixer: object, state: State) -> bool:
    """Whether a layer keeps a matrix a head, which linear recurrences do and no other does."""
    kept = state.get("recurrent")
    matrices = isinstance(mixer, Mixer) and mixer.state_heads == 1
    return matrices and kept is not None and kept.ndim == 4


@torch.no_grad()
def kept(model: Decoder, text: list[int], ends: Iterable[int]) -> dict[str, dict[int, list[float]]]:
    """By layer (`00`), and number of tokens read, the share of S_1 that is left in each head.

    The text is read once for each layer without what its first token wrote there, beside itself as
    it is: all else that the layer gets is the same, so that what differs in its state is that part.
    In float32 shares below about 1e-6 of the norm of a whole state are noise.

    Args:
        text: token ids, one at least.
        ends: numbers of tokens read at which to look, from 1 to those of the text.

    Returns:
        Nothing of layers without a matrix a head; 0 for heads in which the first token wrote
        nothing.
    """
    first = torch.tensor([text[:1]], device=model.output_weight.device)
    state = _read(model, first, None)
    mixers = [block.get_submodule("mixer") for block in model.blocks.values()]
    pairs = enumerate(zip(mixers, state.layers, strict=True))
    linear = [layer for layer, (mixer, own) in pairs if is_linear(mixer, own)]
    names = [f"{int(name):02d}" for name in model.blocks]
    written = {layer: _norms(state.layers[layer]["recurrent"])[0] for layer in linear}
    rows = len(linear) + 1  # the last one is the text as it is
    layers = [
        {key: part.expand(rows, *part.shape[1:]).clone() for key, part in own.items()}
        for own in state.layers
    ]
    for row, layer in enumerate(linear):
        layers[layer]["recurrent"][row] = 0
    state = DecoderState(layers, state.length.expand(rows))
    found: dict[str, dict[int, list[float]]] = {names[layer]: {} for layer in linear}
    wanted = {1, *ends}
    for start, stop in pairwise(sorted({*range(1, len(text), _PIECE), len(text), *wanted})):
        ids = torch.tensor([text[start:stop]], device=first.device)
        if start in wanted:
            _note(found, names, linear, written, state, start)
        state = _read(model, ids.expand(rows, -1), state)
    if len(text) in wanted:
        _note(found, names, linear, written, state, len(text))
    return found


def _read(model: Decoder, ids: Tensor, state: DecoderState | None) -> DecoderState:
    after = model(ids, state=state).state
    assert after is not None, "a state was asked for"
    return after


def _norms(matrices: Tensor) -> Tensor:
    """`(N, H)`, of `(N, H, K, V)`."""
    return matrices.double().flatten(2).norm(dim=-1)


def _note(
    found: dict[str, dict[int, list[float]]],
    names: list[str],
    linear: list[int],
    written: dict[int, Tensor],
    state: DecoderState,
    at: int,
) -> None:
    """Puts down the shares of every layer after `at` tokens."""
    for row, layer in enumerate(linear):
        recurrent = state.layers[layer]["recurrent"]
        left = _norms((recurrent[-1] - recurrent[row])[None])[0]
        shares = torch.where(written[layer] > 0, left / written[layer], 0.0)
        found[names[layer]][at] = shares.tolist()


def most(found: dict[str, dict[int, list[float]]], trained: int | None) -> dict[str, Any]:
    """As `first_token`: layer, head and share of the head that keeps most at the length in
    training; nothing where `summary` has nothing."""
    cells = [
        {"layer": int(layer), "head": head, "at": trained, "value": share}
        for layer, shares in found.items()
        for head, share in enumerate(shares.get(trained or 0, []))
    ]
    return {"first_token": max(cells, key=lambda cell: cell["value"])} if cells else {}


def summary(found: dict[str, dict[int, list[float]]], trained: int | None) -> dict[str, float]:
    """`unforgetting_heads`, those that keep more than a half at the length in training; nothing
    where texts are shorter or the length is not known."""
    at = [shares[trained] for shares in found.values() if trained in shares]
    if trained is None or not at:
        return {}
    return {"unforgetting_heads": float(sum(share > KEPT for each in at for share in each))}
