"""A value hidden in a long text, asked for at its end: passkeys (arXiv 2410.07145), and single
needles in real text (arXiv 2404.06654)."""

from __future__ import annotations

import json
import random
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rondo.errors import UserError, run_command
from rondo.models import Decoder, load
from rondo.models.loading import find_checkpoint
from rondo.pretrain.data import Tokenizer, load_tokenizer
from rondo.pretrain.data.corpora import open_corpus
from rondo.pretrain.options import parse_command

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


class Kind(NamedTuple):
    """What is hidden, and how it is asked for; `{}` stands for the value."""

    needle: str
    question: str
    alphabet: str
    size: int


_INSTRUCTION = "A pass key is told once in this long text. Keep it in mind, it is asked for below. "
KINDS = {
    "passkey": Kind(
        "The pass key is {0}. Remember it. {0} is the pass key. ",
        "What is the pass key? The pass key is",
        "0123456789",
        5,
    ),
    "number": Kind(
        "The special magic number is {}. ",
        "What is the special magic number? It is",
        "0123456789",
        7,
    ),
    "word": Kind(
        "The special magic word is {}. ",
        "What is the special magic word? It is",
        "0123456789abcdef",
        8,
    ),
}


class Sample(NamedTuple):
    """One text that ends with a question, and its answer."""

    prompt: str
    answer: str
    depth: float
    """Where the needle is: 0 at the start, 1 right before the question."""


@dataclass
class NeedleConfig:
    """What `python -m rondo.evals.needle` measures, or writes."""

    checkpoint: str | None = None
    """A checkpoint folder, or a run folder (its newest checkpoint)."""
    lengths: str = "512,1024,2048,4096"
    """Tokens of a text, question and answer included, separated by commas."""
    kinds: str = "passkey,number,word"
    """Which needles, separated by commas: passkey, number, word; to write, ruler_single_1 to
    ruler_single_3 as well."""
    samples: int = 100
    """Texts for each kind and length."""
    batch_size: int = 8
    """Texts at once."""
    device: str = "cpu"
    """Where the model runs, e.g. cuda."""
    seed: int = 0
    """Seeds the texts. Values of texts to train on (`write`) are never those of texts to score."""
    text: str = "stdlib-english"
    """Where `number` and `word` are hidden: a text file, a folder, or an embedded corpus."""
    write: str | None = None
    """A JSON lines file to write texts to, with their answers, instead of scoring."""
    marks: bool = False
    """Put << >> around the answers written, for `rondo prepare --loss_marks '<< >>'`: loss on them
    alone."""
    output: str | None = None
    """JSON file for the scores; None: `needle.json` in the folder of the checkpoint's run."""


def samples(
    kind: str,
    length: int,
    count: int,
    *,
    seed: int,
    text: Callable[[], str],
    tokens: Callable[[str], int] = lambda text: len(text.encode()),
    split: str = "test",
) -> Iterator[Sample]:
    """`count` samples of at most `length` tokens, as long as whole words allow; passkeys, as whole
    blocks of sentences do.

    A passkey's text is an instruction, `NOISE` again and again with one block of it replaced by one
    that tells the key twice, and the question. Of `count` samples number i has its key at depth
    (i + 1/2) / count: block `int(depth (blocks - 1))`. As in arXiv 2410.07145 but for the words,
    the answer, which counts as part of the length, and keys, which belong to one split each.

    Args:
        kind: a key of `KINDS`.
        split: "test", or "train"; each value belongs to one of them, by its hash.
        text: gives the real text to hide needles in; not called for `passkey`.
        tokens: counts the tokens of a text; the default, its bytes.

    Raises:
        UserError: the kind is unknown, or the length leaves no room.
    """
    if kind not in KINDS:
        raise UserError(f"kinds: unknown needle {kind!r} (known: {', '.join(KINDS)})")
    what = KINDS[kind]
    draw = random.Random(f"{kind} {length} {seed}")
    values = (v for v in _values(what, draw) if split_of(v) == split)
    if kind == "passkey":
        for number, value in zip(range(count), values, strict=False):
            depth = (number + 0.5) / count
            yield Sample(_passkey_prompt(value, depth, length, tokens), f" {value}", depth)
        return
    hay = text()
    for value in islice(values, count):
        needle, answer = what.needle.format(value), f" {value}."
        fixed = tokens(needle + what.question + answer) + 2
        if fixed >= length:
            raise UserError(f"lengths: {length} tokens leave no room beside {fixed} of the needle")
        words = _words(hay, length - fixed, draw, tokens)
        at = draw.randint(0, len(words))
        before, after = (" ".join(part) for part in (words[:at], words[at:]))
        parts = [before, needle.strip(), after, what.question]
        prompt = " ".join(part for part in parts if part)
        yield Sample(prompt, answer, at / max(1, len(words)))


def _passkey_prompt(value: str, depth: float, length: int, tokens: Callable[[str], int]) -> str:
    what = KINDS["passkey"]
    fixed = tokens(_INSTRUCTION + what.question + f" {value}")
    # Fewer where the block with the key has more tokens than the one that it replaces.
    for blocks in range((length - fixed) // tokens(NOISE), 0, -1):
        hay = [NOISE] * blocks
        hay[int(depth * (blocks - 1))] = what.needle.format(value)
        prompt = f"{_INSTRUCTION}{''.join(hay)}{what.question}"
        if tokens(f"{prompt} {value}") <= length:
            return prompt
    raise UserError(
        f"lengths: {length} tokens leave no room for a passkey beside {fixed} of what is around it"
    )


def split_of(value: str) -> str:
    """Which texts hide a value: one in four is for tests, whatever the seed."""
    return "test" if zlib.crc32(value.encode()) % 4 == 0 else "train"


def _values(what: Kind, draw: random.Random) -> Iterator[str]:
    while True:
        yield "".join(draw.choices(what.alphabet, k=what.size))


def _words(hay: str, room: int, draw: random.Random, tokens: Callable[[str], int]) -> list[str]:
    """Words of the hay, from a random place, that fill `room` tokens."""
    size = 8 * room  # characters: more than that many tokens have
    start = draw.randrange(len(hay))
    words = (hay * (size // len(hay) + 2))[start : start + size].split()[1:]
    low, high = 0, len(words)
    while low < high:  # the most words that fit
        middle = (low + high + 1) // 2
        fits = tokens(" ".join(words[:middle])) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return words[:low]


@torch.no_grad()
def accuracy(
    model: Decoder,
    tokenizer: Tokenizer,
    found: Sequence[Sample],
    batch_size: int = 8,
    device: str = "cpu",
) -> float:
    """Share of the samples whose whole answer greedy decoding would write."""
    right = 0
    for start in range(0, len(found), batch_size):
        batch = found[start : start + batch_size]
        pairs = [(tokenizer.encode(s.prompt), tokenizer.encode(s.answer)) for s in batch]
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        rows = [[*prompt, *answer] for prompt, answer in pairs]
        padded = [row + [tokenizer.eod] * (longest - len(row)) for row in rows]
        ids = torch.tensor(padded, device=device)
        hidden = model(ids, return_state=False).hidden
        for row, (prompt, answer) in enumerate(pairs):
            asked = hidden[row, len(prompt) - 1 : len(prompt) - 1 + len(answer)]
            likely = model.logits(asked)[:, : tokenizer.vocab_size].argmax(-1)
            right += int(likely.tolist() == answer)
    return right / len(found)


def score(config: NeedleConfig) -> dict[str, dict[str, float]]:
    """Accuracy by kind and length, shown as a table and written as JSON.

    Raises:
        UserError: there is no checkpoint, or an option is out of range.
    """
    folder = find_checkpoint(Path(config.checkpoint or ""))
    model, tokenizer = load(folder, config.device).eval(), load_tokenizer(folder / "tokenizer")
    text = real_text(config.text)
    kinds, lengths = config.kinds.split(","), _lengths(config.lengths)
    jobs = [(kind, length) for kind in kinds for length in lengths]
    scores: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    for kind, length in track(jobs, "needles", console=Console(stderr=True)):
        found = list(
            samples(
                kind,
                length,
                config.samples,
                seed=config.seed,
                text=text,
                tokens=lambda text: len(tokenizer.encode(text)),
            )
        )
        scores[kind][str(length)] = accuracy(
            model, tokenizer, found, config.batch_size, config.device
        )
    table = Table("needle", *(f"{length:,}" for length in lengths), title=str(folder))
    for kind, row in scores.items():
        table.add_row(kind, *(f"{value:.1%}" for value in row.values()))
    Console().print(table)
    path = Path(config.output) if config.output else folder.parent.parent / "needle.json"
    path.write_text(json.dumps({"checkpoint": str(folder), "accuracy": scores}, indent=1))
    return scores


def write(config: NeedleConfig) -> Path:
    """Texts with their answers as JSON lines, to train on: all kinds and lengths in turn."""
    from rondo.evals import ruler  # which is made of these

    path, text = Path(config.write or ""), real_text(config.text)
    jobs = [(k, n) for k in config.kinds.split(",") for n in _lengths(config.lengths)]
    given: Any = {"seed": config.seed, "text": text, "split": "train"}
    streams = [
        (ruler.samples if k in ruler.KINDS else samples)(k, n, config.samples, **given)
        for k, n in jobs
    ]
    with path.open("w") as file:
        for group in zip(*streams, strict=True):
            for each in group:
                # RULER's values have neither the space before them nor the stop.
                answer = each.answer if each.answer[0] == " " else f" {each.answer}."
                answer = f"<<{answer}>>" if config.marks else answer
                file.write(json.dumps({"text": each.prompt + answer}) + "\n")
    return path


def _lengths(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise UserError(f"lengths: expected numbers and commas, got {text!r}") from None


def real_text(path: str) -> Callable[[], str]:
    """The text of a corpus, read when it is needed: a few megabytes of it."""

    def read() -> str:
        parts, size = [], 0
        for document in open_corpus(path).documents():
            parts.append(document)
            size += len(document)
            if size > 4_000_000:
                break
        return " ".join(" ".join(parts).split())

    return read


def main(words: list[str]) -> int:
    """Runs the command; see `NeedleConfig`."""
    usage = "python -m rondo.evals.needle CHECKPOINT [--lengths N,N...] [--option value]..."
    config: Any = parse_command(NeedleConfig, words, usage, ("checkpoint",))
    if config is None:
        return 0
    for name in ("samples", "batch_size"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}: must be at least 1, got {getattr(config, name)}")
    if config.write and config.checkpoint:
        raise UserError(f"write: nothing is scored with it, so {config.checkpoint} is not read")
    if config.write:
        write(config)
    elif config.checkpoint is None:
        raise UserError("a checkpoint to score is needed, or --write FILE")
    else:
        score(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
