"""A run folder with a checkpoint, written by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from rondo.models import Decoder, ModelConfig, manifest
from rondo.pretrain.data.tokenizer import ByteTokenizer, Tokenizer


def write_run(
    run: Path,
    step: int = 10,
    mixer: str = "gated_deltanet",
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> Path:
    """Writes the run of a small random model, of bytes by default, and returns its checkpoint."""
    words = tokenizer or ByteTokenizer()
    config = ModelConfig(
        vocab_size=words.vocab_size,
        dim=64,
        num_layers=2,
        pattern=[mixer],
        mixers={mixer: options} if options else {},
    )
    folder = run / "checkpoints" / f"step-{step:09d}"
    for name in ("model", "tokenizer"):
        (folder / name).mkdir(parents=True)
    save_file(Decoder(config, seed=step).state_dict(), folder / "model" / "model.safetensors")
    (folder / "model" / "config.json").write_text(json.dumps(asdict(config)))
    words.save(folder / "tokenizer")
    files = [file for file in folder.rglob("*") if file.is_file()]
    records = {str(f.relative_to(folder)): manifest.record(f) for f in files}
    manifest.write(folder, step, records)
    return folder
