"""A model as lm-evaluation-harness asks for it."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Sequence
from itertools import groupby
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from rich.console import Console
from rich.progress import track

from rondo.evals.scoring import continuations, token_log_likelihoods
from rondo.models import Decoder
from rondo.models.generate import stream
from rondo.pretrain.data import Tokenizer

T = TypeVar("T")
MAX_NEW_TOKENS = 256
"""Where a task does not say how long an answer may be; the harness's own default."""


class HarnessModel(TemplateLM):
    """Scores and texts of `model`; none depends on the batch size.

    Under torch.distributed each rank is handed all requests, answers its share, and gets the
    answers of the others.

    Args:
        batch_size: contexts, or continuations, at once.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, batch_size: int = 8) -> None:
        super().__init__()
        self.model, self.words, self.batch_size = model, tokenizer, batch_size
        self._device = model.output_weight.device
        # The harness would divide samples itself, and fails where a rank gets none.
        self.own, self.ranks = 0, 1
        if dist.is_initialized():
            self.own, self.ranks = dist.get_rank(), dist.get_world_size()

    @property
    def eot_token_id(self) -> int:
        """The end of a document, which also begins a text without context."""
        return self.words.eod

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; nothing is added."""
        return self.words.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context or [self.eot_token_id], ids) for _, context, ids in requests]
        mine = self._share([tuple(context) for context, _ in pairs])
        scores = continuations(
            self.model, [pairs[i] for i in mine], self.batch_size, progress=self.own == 0
        )
        found = self._all(mine, [tuple(score) for score in scores])
        for (texts, _, _), score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, nats: every token sees all before it, from `eod` on."""
        mine, totals = self._share(range(len(requests))), []
        for i in self._track(mine, "texts", disable_tqdm):
            ids = [self.eot_token_id, *self.tok_encode(requests[i].args[0])]
            totals.append(float(token_log_likelihoods(self.model, ids).double().sum()))
        found = self._all(mine, totals)
        for request, total in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the strings in `until`, `max_gen_toks` or `eod`."""
        prompts = [self.tok_encode(r.args[0]) or [self.eot_token_id] for r in requests]
        given: list[Any] = [[*request.args][1] for request in requests]
        keys = [json.dumps([len(p), o]) for p, o in zip(prompts, given, strict=True)]
        mine = self._share(range(len(requests)))
        order = sorted(mine, key=keys.__getitem__)
        groups = [list(same) for _, same in groupby(order, keys.__getitem__)]
        texts = {}
        for group in self._track(groups, "answers", disable_tqdm):
            options = given[group[0]]
            # Draws of rows read together would depend on each other.
            size = 1 if _temperature(options) else self.batch_size
            for start in range(0, len(group), size):
                part = group[start : start + size]
                new = self._generate([prompts[i] for i in part], options)
                texts.update(zip(part, new, strict=True))
        found = self._all(mine, [texts[i] for i in mine])
        for request, text in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found

    def _track(self, jobs: list[T], name: str, hidden: bool) -> Iterable[T]:
        """`jobs` with a progress bar, on the first rank."""
        console = Console(stderr=True)
        return track(jobs, name, console=console, disable=hidden or self.own > 0)

    def _generate(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        """Continues prompts of one length."""
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        written: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        for tokens in stream(
            self.model,
            torch.tensor(prompts, device=self.device),
            max_tokens=int(options.get("max_gen_toks", MAX_NEW_TOKENS)),
            temperature=_temperature(options),
            top_k=int(options.get("top_k", 0)),
            top_p=float(options.get("top_p", 1.0)),
            vocabulary=self.words.vocab_size,
        ):
            for row, token in enumerate(tokens.tolist()):
                if row in going and token != self.eot_token_id:
                    written[row].append(token)
                    if not _stopped(self.words.decode(written[row]), stops):
                        continue
                going.discard(row)
            if not going:
                break
        return [_cut(self.words.decode(ids), stops) for ids in written]

    def _share(self, keys: Sequence[Hashable]) -> list[int]:
        """This rank's requests; those with one key stay together."""
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        return [i for i, key in enumerate(keys) if number[key] % self.ranks == self.own]

    def _all(self, mine: list[int], found: list[T]) -> list[T]:
        """The answers to all requests, from those to each rank's."""
        parts: list[Any] = [dict(zip(mine, found, strict=True))]
        if self.ranks > 1:
            parts *= self.ranks
            dist.all_gather_object(parts, parts[0])
        merged = {i: answer for part in parts for i, answer in part.items()}
        return [merged[i] for i in range(len(merged))]


def _temperature(options: dict[str, Any]) -> float:
    """0, which is greedy, unless sampling is asked for."""
    return float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0


def _stopped(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)


def _cut(text: str, stops: Sequence[str]) -> str:
    """What is before the first stop."""
    return text[: min((text.find(s) for s in stops if s and s in text), default=len(text))]
