"""Log-likelihoods of continuations and of whole texts, from a model's own state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from rondo.models import Decoder
from rondo.models.decoder import DecoderState
from rondo.models.layers import at_least_float32


class Score(NamedTuple):
    """What a model says about a continuation."""

    log_likelihood: float
    """Sum over its tokens, nats (at most 0)."""
    greedy: bool
    """Every token is the most likely one after those before it."""


Pair = tuple[tuple[int, ...], tuple[int, ...]]


@torch.no_grad()
def continuations(
    model: Decoder,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = 8,
    progress: bool = False,
) -> list[Score]:
    """The score of each `(context, continuation)`, token ids, in the order given.

    A context is read once, whatever number of continuations it has; contexts read together are of
    one length, so that none is padded. Continuations go on from its state with padding on their
    right, which a causal model cannot see.

    Raises:
        ValueError: a context or a continuation is empty.
    """
    keys: list[Pair] = [(tuple(a), tuple(b)) for a, b in pairs]
    for context, continuation in keys:
        if not context or not continuation:
            raise ValueError("contexts and continuations need at least one token each")
    by_context: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for context, continuation in dict.fromkeys(keys):
        by_context.setdefault(context, []).append(continuation)
    # The longest first: a batch that does not fit in memory shows at once.
    order = sorted(by_context, key=len, reverse=True)
    found: dict[Pair, Score] = {}
    groups, console = _batches(order, batch_size), Console(stderr=True)
    for group in track(groups, "scores", console=console, disable=not progress):
        state = _read(model, group)
        jobs = [(row, c) for row, context in enumerate(group) for c in by_context[context]]
        for start in range(0, len(jobs), batch_size):
            part = jobs[start : start + batch_size]
            scores = _go_on(model, state, [(row, group[row][-1], c) for row, c in part])
            for (row, continuation), score in zip(part, scores, strict=True):
                found[group[row], continuation] = score
    return [found[key] for key in keys]


@torch.no_grad()
def token_log_likelihoods(model: Decoder, ids: Sequence[int], chunk: int = 1024) -> Tensor:
    """`(len(ids) - 1,)` float32: of each token but the first, given all before it, nats.

    Read in pieces of `chunk` tokens that carry the state: every token sees all of the text.
    """
    row = torch.tensor([list(ids)], device=model.output_weight.device)
    state, parts = None, []
    for start in range(0, row.shape[1] - 1, chunk):
        piece = row[:, start : min(start + chunk, row.shape[1] - 1)]
        output = model(piece, state=state)
        state = output.state
        logits = at_least_float32(model.logits(output.hidden[0]))
        target = row[0, start + 1 : start + 1 + piece.shape[1], None]
        parts.append(logits.log_softmax(-1).gather(1, target)[:, 0].cpu())
    return torch.cat(parts) if parts else torch.zeros(0)


def _batches(contexts: list[tuple[int, ...]], size: int) -> list[list[tuple[int, ...]]]:
    """At most `size` contexts of one length each; `contexts` are sorted by length."""
    batches: list[list[tuple[int, ...]]] = []
    for context in contexts:
        if not batches or len(batches[-1]) == size or len(batches[-1][0]) != len(context):
            batches.append([])
        batches[-1].append(context)
    return batches


def _read(model: Decoder, contexts: list[tuple[int, ...]]) -> DecoderState | None:
    """The state before each context's last token."""
    if len(contexts[0]) == 1:
        return None
    ids = torch.tensor([c[:-1] for c in contexts], device=model.output_weight.device)
    return model(ids).state


def _go_on(
    model: Decoder, state: DecoderState | None, jobs: list[tuple[int, int, tuple[int, ...]]]
) -> list[Score]:
    """Scores of `(row of the state, last token of the context, continuation)`."""
    device = model.output_weight.device
    longest = max(len(c) for _, _, c in jobs)
    rows = [[last, *c[:-1]] + [0] * (longest - len(c)) for _, last, c in jobs]
    picked = None
    if state is not None:
        index = torch.tensor([row for row, _, _ in jobs], device=device)
        layers = [{n: t.index_select(0, index) for n, t in s.items()} for s in state.layers]
        picked = DecoderState(layers, state.length.index_select(0, index))
    ids = torch.tensor(rows, device=device)
    hidden = model(ids, state=picked, return_state=False).hidden
    scores = []
    for row, (_, _, continuation) in enumerate(jobs):
        target = torch.tensor(continuation, device=device)
        logits = at_least_float32(model.logits(hidden[row, : len(continuation)]))
        likely = logits.log_softmax(-1).gather(1, target[:, None]).double().sum()
        scores.append(Score(float(likely), bool((logits.argmax(-1) == target).all())))
    return scores
