"""Text from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rondo.errors import UserError
from rondo.models import load
from rondo.models.generate import stream
from rondo.models.loading import find_checkpoint
from rondo.pretrain.data import load_tokenizer


@dataclass
class GenerateConfig:
    """What `rondo generate` writes."""

    checkpoint: str
    """A checkpoint folder, or a run folder (its newest checkpoint)."""
    prompt: str = ""
    """Text to continue; empty starts a new document."""
    max_tokens: int = 128
    """Tokens to write at most; the end of a document ends the text."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Draw among the k most likely tokens; 0: among all."""
    top_p: float = 0.95
    """Draw among the most likely tokens that make up this probability."""
    seed: int = 0
    """Seeds the draws."""


def generate_text(config: GenerateConfig) -> str:
    """Writes the continuation to standard output as it arises, and returns it.

    Raises:
        UserError: there is no checkpoint, or an option is out of range.
    """
    folder = find_checkpoint(Path(config.checkpoint))
    model = load(folder).eval()
    tokenizer = load_tokenizer(folder / "tokenizer")
    ids = tokenizer.encode(config.prompt) or [tokenizer.eod]
    written = config.prompt
    print(written, end="", flush=True)
    new: list[int] = []
    try:
        for token in stream(
            model,
            torch.tensor([ids]),
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            vocabulary=tokenizer.vocab_size,
        ):
            if int(token) == tokenizer.eod:
                break
            new.append(int(token))
            # A character may take several tokens: what may still change is held back.
            text = config.prompt + tokenizer.decode(new)
            if not text.endswith("\ufffd"):
                print(text[len(written) :], end="", flush=True)
                written = text
    except ValueError as error:
        raise UserError(str(error)) from error
    print(flush=True)
    return config.prompt + tokenizer.decode(new)
