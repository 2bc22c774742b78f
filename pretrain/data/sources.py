"""From the recipe's `data` section to a dataset, preparing on the way what is not prepared yet."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rondo.pretrain.data.corpora import open_corpus
from rondo.pretrain.data.dataset import Sources, Split, TokenDataset
from rondo.pretrain.data.errors import DataError, told_of
from rondo.pretrain.data.folders import build_lock, publish
from rondo.pretrain.data.held_out import held_out_folder
from rondo.pretrain.data.prepare import PrepareConfig, prepare, request_hash, request_of
from rondo.pretrain.data.row_sources import open_rows
from rondo.pretrain.data.streaming import StreamedSource
from rondo.pretrain.data.tokenizer import Tokenizer, load_tokenizer
from rondo.pretrain.data.train_tokenizer import parse_pieces, sample, train_sentencepiece
from rondo.pretrain.recipe import DataConfig, SourceConfig

AUTO = "auto"
_STEPS_BEHIND = 16
"""More steps than batches are made ahead of the one that is trained on."""


def open_dataset(
    config: DataConfig, seed: int, split: Split, vocab_size: int | None = None
) -> TokenDataset:
    """The recipe's mixture. Prepares sources first where need be; any number of processes may
    call it at once. Raises DataError as `prepare` and `TokenDataset` do."""
    sources = prepare_sources(config, seed)
    return TokenDataset(sources, config.sequence_length, seed, split, vocab_size)


def prepare_sources(
    config: DataConfig, seed: int = 0, saved: Mapping[int, list[Any]] | None = None
) -> Sources:
    """Folders of token files for every source, and their tokenizer; of a source that is streamed,
    in the order of the run's `seed`, the folder has the held-out text alone. `saved`, by number:
    what `open_rows` is to open again, where a run goes on.

    A source that is not a prepared folder is prepared into `<folder>/<name>-<hash>`, where the
    hash covers the source, the tokenizer and the options; when that folder is there, nothing is
    done.
    """
    if not config.sources:
        raise DataError("data.sources is empty; expected at least one source")
    prepared = [_prepared_folder(source) for source in config.sources]
    spec = _tokenizer_spec(config, prepared)
    with told_of("data.tokenizer"):
        tokenizer = load_tokenizer(spec)
    folders, streamed = [], {}
    for number, (source, folder) in enumerate(zip(config.sources, prepared, strict=True)):
        if source.streaming:
            with told_of(f"data.sources.{number}.path"):
                rows = open_rows(source.path, (saved or {}).get(number))
            folder = held_out_folder(
                rows, tokenizer, config.validation_fraction, Path(config.folder)
            )
            streamed[number] = StreamedSource(
                rows,
                tokenizer,
                (seed, number),
                source.shuffle_buffer,
                config.validation_fraction,
                history=_STEPS_BEHIND * config.global_batch_size * config.sequence_length,
            )
        elif folder is None:
            with told_of(f"data.sources.{number}.path"):
                folder = prepare(_preparation(config, source, str(spec)))
        else:
            _require_same(folder, tokenizer, config.tokenizer)
        folders.append(folder)
    weights = [source.weight for source in config.sources]
    return Sources(folders, weights, tokenizer, streamed=streamed)


def _prepared_folder(source: SourceConfig) -> Path | None:
    path = Path(source.path).expanduser()
    if source.streaming:
        return None
    return path if (path / "train.idx").is_file() else None


def _preparation(config: DataConfig, source: SourceConfig, tokenizer: str) -> PrepareConfig:
    draft = PrepareConfig(
        input=source.path,
        output="",
        tokenizer=tokenizer,
        validation_fraction=config.validation_fraction,
    )
    request = request_of(draft, open_corpus(draft.input, draft.text_field, draft.document_bytes))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source.path).name).strip("-.") or "source"
    draft.output = str(Path(config.folder) / f"{name[:64]}-{request_hash(request)}")
    return draft


def _tokenizer_spec(config: DataConfig, prepared: list[Path | None]) -> str | Path:
    """What `load_tokenizer` is to load; trains "sentencepiece:N" on all sources first."""
    if config.tokenizer == AUTO:
        return next((folder for folder in prepared if folder), "bytes")
    with told_of("data.tokenizer"):
        pieces = parse_pieces(config.tokenizer)
    if pieces is None:
        return config.tokenizer
    folders = [str(folder) for folder in prepared if folder]
    if folders:
        raise DataError(
            f"data.tokenizer is {config.tokenizer!r}, but {', '.join(folders)} is already "
            f"tokenised; expected {AUTO!r} or the path of its tokenizer"
        )
    return _trained_tokenizer(config, pieces)


def _trained_tokenizer(config: DataConfig, pieces: int) -> Path:
    """The folder of a tokenizer trained on the sources, each in proportion to its weight."""
    if streamed := [source.path for source in config.sources if source.streaming]:
        raise DataError(
            f"data.tokenizer is {config.tokenizer!r}, which is trained on whole sources, and "
            f"{streamed[0]} is streamed; train it with `rondo prepare` on a part and give its path"
        )
    defaults = PrepareConfig(input="", output="")
    corpora = []
    for number, source in enumerate(config.sources):
        with told_of(f"data.sources.{number}.path"):
            corpora.append(open_corpus(source.path))
    total = sum(source.weight for source in config.sources)
    shares = [source.weight / total for source in config.sources]
    inputs = [pieces, defaults.tokenizer_sample_mb, [c.identity for c in corpora], shares]
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
    output = Path(config.folder).expanduser() / f"tokenizer-{pieces}-{digest}"
    if output.is_dir():
        return output
    with build_lock(output) as scratch:
        if output.is_dir():
            shutil.rmtree(scratch)
            return output

        try:
            texts: list[str] = []
            for number, (corpus, share) in enumerate(zip(corpora, shares, strict=True)):
                budget = int(share * defaults.tokenizer_sample_mb * 1e6)
                with told_of(f"data.sources.{number}.path"):
                    texts += sample(corpus.documents(), max(1, budget))
            finished = scratch / "out"
            shutil.rmtree(finished, ignore_errors=True)
            finished.mkdir()
            with told_of("data.tokenizer"):
                train_sentencepiece(texts, pieces).save(finished)
            publish(finished, output, scratch)
        except DataError:
            shutil.rmtree(scratch)
            raise
    return output


def _require_same(folder: Path, tokenizer: Tokenizer, spec: str) -> None:
    """Raise DataError when a prepared folder was made with another tokenizer."""
    if not (folder / "card.json").is_file():  # token files of another origin say nothing
        return
    own = load_tokenizer(folder)
    if own.fingerprint() != tokenizer.fingerprint():
        raise DataError(
            f"{folder}: tokenised with another tokenizer ({own.kind}, {own.vocab_size} ids) than "
            f"data.tokenizer {spec!r} ({tokenizer.kind}, {tokenizer.vocab_size} ids)"
        )
