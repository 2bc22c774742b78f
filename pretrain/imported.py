"""What an imported checkpoint keeps of the Hugging Face folder that it was read from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rondo.models import hf, manifest
from rondo.models.loading import read_json

NAME = "source.json"
"""In the checkpoint's folder. Its keys: `folder` (a name) and `files` (size and SHA-256 of each),
of which the model was read; `config` and `tokens`, which an export gives back."""
_KEYS = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
_MAX_BYTES = 64 << 20


def write_source(checkpoint: Path, folder: Path, *, other_tokenizer: bool) -> None:
    """Says in `checkpoint` of which `folder` it is made; with an `other_tokenizer` than the
    folder's, nothing of its special tokens. Raises UserError where it is no such folder."""
    files = [folder / "config.json", *hf.weight_files(folder)]
    values = read_json(files[0], _MAX_BYTES)
    keys = _KEYS[:1] if other_tokenizer else _KEYS
    tokens = {} if other_tokenizer else _special_tokens(folder / "tokenizer_config.json")
    source = {
        "folder": folder.resolve().name,
        "files": {file.name: manifest.record(file)._asdict() for file in files},
        "config": {key: values[key] for key in keys if values.get(key) is not None},
        "tokens": tokens,
    }
    (checkpoint / NAME).write_text(json.dumps(source, indent=1) + "\n")


def read_source(checkpoint: Path) -> dict[str, Any]:
    """`config` and `tokens` of an imported checkpoint, empty in others. Raises UserError."""
    path = checkpoint / NAME
    found = read_json(path, _MAX_BYTES) if path.is_file() else {}
    return {"config": {}, "tokens": {}, **found}


def _special_tokens(path: Path) -> dict[str, str]:
    """Text by name, such as bos_token."""
    values = read_json(path, _MAX_BYTES) if path.is_file() else {}
    named = {key: value for key, value in values.items() if key.endswith("_token")}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}
