"""Text continuation, one token at a time, from the model's own state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rondo.models.decoder import Decoder


def sample_token(
    logits: Tensor,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Draws token ids `(B,)` from `logits` `(B, vocab)`.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keeps the k most likely tokens; 0 keeps all.
        top_p: keeps the smallest set of most likely tokens whose probability reaches this.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, order, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


@torch.no_grad()
def stream(
    model: Decoder,
    prompt: Tensor,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    vocabulary: int | None = None,
) -> Iterator[Tensor]:
    """Yields the next tokens `(B,)`, one step at a time, after `prompt` `(B, T >= 1)`; only ids
    below `vocabulary`, where the model has more rows than the tokenizer has tokens.

    Raises:
        ValueError: a sampling option is out of range; the message names it.
    """
    for name, value, fits in (
        ("max_tokens", max_tokens, max_tokens >= 0),
        ("temperature", temperature, temperature >= 0),
        ("top_k", top_k, top_k >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
    ):
        if not fits:
            raise ValueError(f"{name} is out of range: {value}")
    generator = torch.Generator(prompt.device).manual_seed(seed)
    tokens, state = prompt, None
    for _ in range(max_tokens):
        hidden, state, *_ = model(tokens, state=state)
        logits = model.logits(hidden[:, -1])[:, :vocabulary]
        tokens = sample_token(logits, generator, temperature=temperature, top_k=top_k, top_p=top_p)[
            :, None
        ]
        yield tokens[:, 0]


def generate(
    model: Decoder, prompt: Tensor, *, max_tokens: int, eod: int | None = None, **sampling: Any
) -> Tensor:
    """Continues `prompt` `(B, T)`; returns `(B, T + n)` with n at most `max_tokens`.

    Args:
        eod: stops when every row has produced this token; a row that has goes on repeating it.
        sampling: `temperature`, `top_k`, `top_p` and `seed`, as in `stream`.
    """
    columns = [prompt]
    done = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    for token in stream(model, prompt, max_tokens=max_tokens, **sampling):
        if eod is not None:
            token = torch.where(done, eod, token)
            done = done | (token == eod)
        columns.append(token[:, None])
        if bool(done.all()):
            break
    return torch.cat(columns, 1)
