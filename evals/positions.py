"""Loss and state by position: whether a model makes use of what is far back, and whether its state
stays what it was in training (state collapse, arXiv 2410.07145).

Positions are read at powers of two; losses also by buckets of 512 tokens, and which heads' states
are largest and smallest every 128 tokens (`state_heads`). A state is the matrix of a head after so
many tokens; its effective rank is `exp(-Σ p_i log p_i)` of its singular values over their sum, p
(Roy and Vetterli, 2007).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from rondo.errors import UserError
from rondo.evals import first_token
from rondo.evals.state_heads import StateHeads
from rondo.models import Decoder
from rondo.models.decoder import DecoderState
from rondo.models.mixer import Mixer
from rondo.pretrain.data import Tokenizer
from rondo.pretrain.data.corpora import open_corpus
from rondo.pretrain.plain import read_yaml

KIND = "positions"
DEGENERATE = {"newlines": "\n", "capitals": "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
"""Texts of one token again and again, by task: each text of another of these letters in turn."""
KINDS = (KIND, *DEGENERATE)
_BUCKET = 512
"""Tokens of a bucket of losses."""
_PIECE = 128
"""Tokens that are read together, at most; after so many states are looked at."""
Curves = dict[str, dict[int, float]]


def length_of(name: str) -> int | None:
    """Tokens of a text of the task `positions_8192`, `newlines_8192` or `capitals_8192`; None for
    other tasks."""
    match = re.fullmatch(rf"(?:{'|'.join(KINDS)})_(\d+)", name)
    return int(match[1]) if match else None


def trained_length(checkpoint: Path) -> int | None:
    """Tokens of a sequence in training, by the recipe of the checkpoint's run."""
    file = checkpoint.resolve().parent.parent / "recipe.yaml"
    data = read_yaml(file.read_text()).get("data") if file.is_file() else None
    return data.get("sequence_length") if isinstance(data, dict) else None


def rows(text: str, tokenizer: Tokenizer, length: int, count: int) -> list[list[int]]:
    """Up to `count` texts of `length + 1` tokens: the documents one after the other, each with the
    end of a document before it, cut where they are.

    Raises:
        UserError: the text is shorter than one.
    """
    found: list[list[int]] = []
    held: list[int] = []
    for document in open_corpus(text).documents():
        held += [tokenizer.eod, *tokenizer.encode(document)]
        while len(held) > length and len(found) < count:
            found.append(held[: length + 1])
            held = held[length:]
        if len(found) == count:
            break
    if not found:
        raise UserError(f"{KIND}_{length}: {text} has only {len(held)} tokens")
    return found


def degenerate(kind: str, tokenizer: Tokenizer, length: int, count: int) -> list[list[int]]:
    """As `rows`: the end of a document and the tokens of one letter, again and again; as many texts
    as there are letters at most. `kind` is a key of `DEGENERATE`.

    Raises:
        UserError: the tokenizer makes no token of a letter.
    """
    tokens = [tokenizer.encode(letter) for letter in DEGENERATE[kind][:count]]
    if not all(tokens):
        raise UserError(f"{kind}_{length}: the tokenizer has no token for one of its texts")
    return [[tokenizer.eod, *(own * length)[:length]] for own in tokens]


@torch.no_grad()
def curves(
    model: Decoder,
    texts: list[list[int]],
    batch_size: int = 8,
    progress: bool = False,
    heads: StateHeads | None = None,
) -> Curves:
    """By position, the mean over texts of one length.

    `loss` is that of the tokens from so many up to before twice as many before them, nats a token;
    `loss_512`, if texts are so long, that of the 512 tokens up to where so many are read. By layer,
    after so many tokens: `state_norm` and `effective_rank` are means over heads, `largest_norm` is
    that of the head where it is largest (Frobenius), `largest_variance` that of the numbers of the
    state of a head where it is largest. `heads` takes the states of all heads.
    """
    length = len(texts[0]) - 1
    sums: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    batches = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    for batch in track(batches, KIND, console=Console(stderr=True), disable=not progress):
        ids = torch.tensor(batch, device=model.output_weight.device)
        state = None
        for start, stop in _pieces(length):
            output = model(ids[:, start:stop], state=state)
            state = output.state
            targets = ids[:, start + 1 : stop + 1]
            nats = model.hidden_loss(output.hidden, targets, reduction="none").double().sum()
            # The token at index i has i tokens before it.
            sums["loss"][_power(start + 1)] += float(nats)
            if (bucket := (start // _BUCKET + 1) * _BUCKET) <= length:
                sums["loss_512"][bucket] += float(nats)
            border = stop == _power(stop) or stop == length
            states = _states(model, state) if border or stop % _PIECE == 0 else []
            for kept in states:
                if heads is not None:
                    heads.note(kept.layer, stop, kept.heads)
                for name, total in _of_state(kept).items() if border else ():
                    sums[name][stop] += total
        if heads is not None:
            heads.texts += len(batch)
    widths = {_power(i): min(2 * _power(i), length + 1) - _power(i) for i in range(1, length + 1)}
    tokens = {"loss": widths, "loss_512": dict.fromkeys(sums["loss_512"], _BUCKET)}
    return {
        name: {at: total / len(texts) / tokens.get(name, {}).get(at, 1) for at, total in of.items()}
        for name, of in sums.items()
        if of
    }


def _power(position: int) -> int:
    """The largest power of two up to a position."""
    return 1 << (position.bit_length() - 1)


def _pieces(length: int) -> Iterator[tuple[int, int]]:
    """From 0 to `length`, with borders before and at every power of two, and after every 128:
    tokens read together have targets of one bin, and states are seen at these."""
    borders = {*range(0, length, _PIECE), length}
    for k in range(length.bit_length()):
        borders |= {p for p in ((1 << k) - 1, 1 << k) if p <= length}
    yield from itertools.pairwise(sorted(borders))


class _State(NamedTuple):
    """The states of a layer."""

    layer: str
    heads: Tensor
    """`(B, H, ...)` float32."""
    matrices: bool
    """Whether each is that of a linear recurrence."""


def _states(model: Decoder, state: DecoderState) -> Iterator[_State]:
    for (layer, block), kept in zip(model.blocks.items(), state.layers, strict=True):
        mixer = block.get_submodule("mixer")
        tensor = kept.get("recurrent", kept.get("memory"))
        if tensor is not None and isinstance(mixer, Mixer):
            heads = tensor.float().movedim(mixer.state_heads, 1)
            matrices = heads.ndim == 4 and mixer.state_heads == 1 and "recurrent" in kept
            yield _State(f"{int(layer):02d}", heads, matrices)


def _of_state(kept: _State) -> dict[str, float]:
    """Sums over the rows of a batch, by measure and layer."""
    norms = kept.heads.flatten(2).norm(dim=-1)
    variances = kept.heads.flatten(2).var(-1, correction=0)
    found = {
        f"state_norm/{kept.layer}": float(norms.mean(1).sum()),
        f"largest_norm/{kept.layer}": float(norms.amax(1).sum()),
        f"largest_variance/{kept.layer}": float(variances.amax(1).sum()),
    }
    if kept.matrices:
        found[f"effective_rank/{kept.layer}"] = float(_effective_rank(kept.heads).mean(1).sum())
    return found


def _effective_rank(matrices: Tensor) -> Tensor:
    """`(...)`, of `(..., K, V)`; that of a zero matrix is 0."""
    values = torch.linalg.svdvals(matrices.double())
    total = values.sum(-1, keepdim=True)
    shares = values / total.clamp(min=1e-300)
    entropy = -(shares * shares.clamp(min=1e-300).log()).sum(-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), 0.0)


def summary(found: Curves, trained: int | None) -> dict[str, float]:
    """What one number can say: `loss` over all tokens; and, where texts are longer than those in
    training, `collapse`, the most that the loss of a later bin exceeds that of the last one within
    (nats; 0 or less: none), `collapse_512`, the same of buckets of 512 tokens, and `state_growth`,
    the same of the largest norm of a layer, as a ratio."""
    loss = found["loss"]
    last = max(max(values) for values in found.values())
    sizes = {at: min(2 * at, last + 1) - at for at in loss}
    values = {"loss": sum(loss[at] * size for at, size in sizes.items()) / sum(sizes.values())}
    within = [at for at in loss if trained and 2 * at - 1 <= trained]
    if within and (beyond := [at for at in loss if at >= 2 * within[-1]]):
        values["collapse"] = max(loss[at] for at in beyond) - loss[within[-1]]
    buckets = found.get("loss_512", {})
    inside = [at for at in buckets if trained and at <= trained]
    if inside and (outside := [loss for at, loss in buckets.items() if at > inside[-1]]):
        values["collapse_512"] = max(outside) - buckets[inside[-1]]
    growth = []
    for name, norms in found.items():
        early = [n for at, n in norms.items() if trained and at <= trained]
        late = [n for at, n in norms.items() if trained and at > trained]
        if name.startswith("largest_norm/") and early and late and max(early) > 0:
            growth.append(max(late) / max(early))
    return values | ({"state_growth": max(growth)} if growth else {})


def of_first_token(
    model: Decoder, text: list[int], trained: int | None
) -> tuple[Curves, dict[str, float], dict[str, Any]]:
    """`first_token/LAYER` by position, the largest share over heads that is left of the first
    token's state (`first_token.kept`), its summary, and which head has kept most at the length in
    training."""
    length = len(text) - 1
    ends = {1 << k for k in range(length.bit_length())} | {length}
    ends |= {trained} if trained and trained <= length else set()
    found = first_token.kept(model, text[:length], ends)
    shown = {
        f"first_token/{layer}": {at: max(shares) for at, shares in by_end.items()}
        for layer, by_end in found.items()
    }
    return shown, first_token.summary(found, trained), first_token.most(found, trained)


def result(
    name: str,
    found: Curves,
    more: dict[str, float],
    trained: int | None,
    heads: StateHeads,
    extremes: dict[str, Any],
    about: dict[str, Any],
) -> dict[str, Any]:
    """What `rondo eval` keeps, in the form of the harness's results, with `curves`, and by head
    `heads` and `extremes`; `more` are numbers beside those of `summary`."""
    texts = heads.texts
    numbers = summary(found, trained) | more
    numbers["perplexity"] = math.exp(numbers["loss"])
    return {
        "results": {name: {"alias": name, **{f"{k},none": v for k, v in numbers.items()}}},
        "configs": {name: {"task": name, "trained_length": trained}},
        "versions": {name: 1.0},
        "n-samples": {name: {"original": texts, "effective": texts}},
        "higher_is_better": {name: dict.fromkeys(numbers, False)},
        "curves": {key: {str(at): v for at, v in sorted(c.items())} for key, c in found.items()},
        "heads": heads.by_tokens(),
        "extremes": heads.extremes(trained) | extremes,
        "config": about,
    }
