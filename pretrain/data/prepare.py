"""`rondo prepare`: text in, Megatron token files with a card out."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from rondo.pretrain.data.card import CARD, read_card
from rondo.pretrain.data.corpora import Corpus, open_corpus
from rondo.pretrain.data.errors import DataError, told_of
from rondo.pretrain.data.folders import build_lock, publish, require_free, sha256_file
from rondo.pretrain.data.loss_marks import parse_marks
from rondo.pretrain.data.merge import SPLITS, merge
from rondo.pretrain.data.shards import available_workers, group_documents, write_shards
from rondo.pretrain.data.tokenizer import Tokenizer, load_tokenizer
from rondo.pretrain.data.train_tokenizer import parse_pieces, sample, train_sentencepiece


@dataclass
class PrepareConfig:
    """What is tokenised, how, and where it goes."""

    input: str
    """Text, JSON lines or Parquet file (or compressed), a folder of them, a Hugging Face hub name
    (owner/name or owner/name:configuration), or an embedded corpus (stdlib-english,
    stdlib-code)."""
    output: str
    """Folder to write; it appears when everything is in it."""
    tokenizer: str = "bytes"
    """'bytes', 'sentencepiece:N' (trained on the input with N pieces), the path of a sentencepiece
    .model or a Hugging Face tokenizer.json, or a prepared folder (its tokenizer)."""
    text_field: str = "text"
    """Where JSON lines, Parquet rows and hub rows hold their text."""
    document_bytes: int = 65536
    """Text files are cut into documents of about this size, at blank lines where there are any;
    0 makes each file one document."""
    validation_fraction: float = 0.02
    """Share of documents held out, chosen by a hash of their text."""
    seed: int = 0
    """Keys that hash."""
    drop_duplicates: bool = False
    """Keep only the first of documents with the same text (duplicates.json counts them)."""
    loss_marks: str = ""
    """Two words that stand around what the loss is on, as in '<< >>', and are taken out; every
    document then needs them. Empty: it is on every token."""
    workers: int = -1
    """Processes that tokenise; 0 uses this one, -1 one for each core."""
    tokenizer_sample_mb: float = 10.0
    """Millions of characters that 'sentencepiece:N' is trained on."""


def prepare(config: PrepareConfig, *, quiet: bool = False) -> Path:
    """Tokenise `config.input` into `config.output` and return that folder.

    It holds `train.bin/.idx`, `validation.bin/.idx`, the tokenizer's file and `card.json`. Work
    that an interrupted call left behind is used; a finished folder is returned as it is.

    Raises DataError for input that cannot be used, and for an output folder that holds
    something else.
    """
    _check(config)
    corpus = open_corpus(config.input, config.text_field, config.document_bytes)
    output = Path(config.output).expanduser()
    request = request_of(config, corpus)
    if _finished(output, request):
        return output
    workers = available_workers(config.workers)
    with build_lock(output) as scratch:
        if _finished(output, request):  # by the process that held the lock before
            shutil.rmtree(scratch)
            return output
        work = _work_folder(scratch, request)
        try:
            _build(config, corpus, request, work, workers, quiet)
            publish(work / "out", output, scratch)
        except DataError:  # nothing here is worth resuming
            shutil.rmtree(scratch)
            raise
        except OSError as error:  # a full disk, say: what is done can be gone on from
            raise DataError(f"{output}: cannot be written: {error}") from error
    return output


def _check(config: PrepareConfig) -> None:
    if not config.output:
        raise DataError("output is empty; expected a folder name")
    if not 0 <= config.validation_fraction < 1:
        raise DataError(
            f"validation_fraction is {config.validation_fraction}; expected 0 <= fraction < 1"
        )
    if config.document_bytes < 0:
        raise DataError(f"document_bytes is {config.document_bytes}; expected 0 or more")
    if not config.tokenizer_sample_mb > 0:
        raise DataError(
            f"tokenizer_sample_mb is {config.tokenizer_sample_mb}; expected more than 0"
        )
    parse_marks(config.loss_marks)
    with told_of("tokenizer"):
        parse_pieces(config.tokenizer)
    if not -(2**63) <= config.seed < 2**63:
        raise DataError(f"seed is {config.seed}; expected a 64-bit integer")


def request_of(config: PrepareConfig, corpus: Corpus) -> dict[str, Any]:
    """Everything that the prepared folder depends on."""
    identity = json.dumps(corpus.identity, sort_keys=True).encode()
    request: dict[str, Any] = {
        "source": corpus.name,
        "source_identity": hashlib.sha256(identity).hexdigest(),
        "text_field": config.text_field,
        "document_bytes": config.document_bytes,
        "validation_fraction": config.validation_fraction,
        "seed": config.seed,
    }
    if config.drop_duplicates:  # absent otherwise: folders of before stay valid
        request["drop_duplicates"] = True
    if config.loss_marks:
        request["loss_marks"] = config.loss_marks.split()
    if parse_pieces(config.tokenizer):
        return request | {
            "tokenizer": config.tokenizer,
            "tokenizer_sample_mb": config.tokenizer_sample_mb,
        }
    with told_of("tokenizer"):
        return request | {"tokenizer": load_tokenizer(config.tokenizer).fingerprint()}


def request_hash(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:12]


def _finished(output: Path, request: dict[str, Any]) -> bool:
    if not (output / CARD).is_file():
        require_free(output)
        return False
    there = read_card(output).get("request", {})
    if there == request:
        return True
    differing = [k for k in sorted({*there, *request}) if there.get(k) != request.get(k)]
    raise DataError(
        f"{output}: holds another preparation (of {there.get('source')!r}; it differs in "
        f"{', '.join(differing)}); choose another output or delete it"
    )


def _work_folder(scratch: Path, request: dict[str, Any]) -> Path:
    """This request's part of the scratch folder, other requests' leftovers removed."""
    work = scratch / request_hash(request)
    for other in scratch.iterdir():
        if other.is_dir() and other != work:
            shutil.rmtree(other)
    shutil.rmtree(work / "out", ignore_errors=True)
    for name in ("tokenizer", "shards", "out"):
        (work / name).mkdir(parents=True, exist_ok=True)
    return work


def _build(
    config: PrepareConfig,
    corpus: Corpus,
    request: dict[str, Any],
    work: Path,
    workers: int,
    quiet: bool,
) -> None:
    console = Console(stderr=True, quiet=quiet)
    started = time.monotonic()
    tokenizer = _tokenizer(config, corpus, work / "tokenizer", console)
    groups = group_documents(_documents(corpus), work / "shards", tokenizer.fingerprint())
    shards = []
    with _progress(console, corpus) as advance:
        for path, size in write_shards(
            groups,
            tokenizer,
            work / "tokenizer",
            config.seed,
            workers,
            parse_marks(config.loss_marks),
        ):
            shards.append(path)
            advance(size)
    card: dict[str, Any] = {"format": 1, "request": request, "source": corpus.name}
    unique = config.drop_duplicates
    out = work / "out"
    card |= merge(sorted(shards), config.validation_fraction, tokenizer, out, unique=unique)
    tokenizer.save(work / "out")
    card["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted((work / "out").iterdir())
    }
    (work / "out" / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    train, held = (card["splits"][split] for split in SPLITS)
    console.print(
        f"prepared {corpus.name} -> {config.output}: {train['documents']:,} + "
        f"{held['documents']:,} documents, {train['tokens']:,} + {held['tokens']:,} tokens "
        f"(train + validation) in {time.monotonic() - started:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    if copies := card["duplicate_documents"]:
        console.print(
            f"{copies:,} documents ({card['duplicate_share']:.1%} of the tokens) repeat an earlier "
            f"one{', and are left out' if unique else '; --drop_duplicates true leaves them out'}",
            highlight=False,
            soft_wrap=True,
        )


def _documents(corpus: Corpus) -> Iterator[str]:
    """Those of a corpus; DataError at its end if none has more than white space."""
    has_text = False
    for text in corpus.documents():
        has_text = has_text or bool(text.strip())
        yield text
    if not has_text:
        raise DataError(f"{corpus.name}: empty corpus: no document with text in it")


def _tokenizer(config: PrepareConfig, corpus: Corpus, folder: Path, console: Console) -> Tokenizer:
    """Load or train the tokenizer and save it in `folder`, where workers find it."""
    pieces = parse_pieces(config.tokenizer)
    if pieces is None:
        tokenizer = load_tokenizer(config.tokenizer)
    elif any(folder.iterdir()):  # trained before an interruption
        return load_tokenizer(folder)
    else:
        with console.status(f"training a tokenizer of {pieces} pieces"):
            texts = sample(corpus.documents(), int(config.tokenizer_sample_mb * 1e6))
            with told_of("tokenizer"):
                tokenizer = train_sentencepiece(texts, pieces)
    beside = folder.with_name("tokenizer.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    tokenizer.save(beside)
    shutil.rmtree(folder)
    beside.rename(folder)
    return tokenizer


@contextmanager
def _progress(console: Console, corpus: Corpus) -> Iterator[Any]:
    """A bar over bytes of text, drawn on a terminal only; yields `advance(bytes)`."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"tokenising {corpus.name}", total=corpus.total_bytes)
        yield lambda size: bar.advance(task, size)
