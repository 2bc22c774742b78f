"""A run folder with a checkpoint, written by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from rondo.models import Decoder, ModelConfig, manifest
from rondo.pretrain.data.tokenizer import ByteTokenizer


def write_run(run: Path, step: int = 10, mixer: str = "gated_deltanet") -> Path:
    """Writes the run of a small random model of bytes, and returns its checkpoint."""
    config = ModelConfig(vocab_size=257, dim=64, num_layers=2, pattern=[mixer])
    folder = run / "checkpoints" / f"step-{step:09d}"
    for name in ("model", "tokenizer"):
        (folder / name).mkdir(parents=True)
    save_file(Decoder(config, seed=step).state_dict(), folder / "model" / "model.safetensors")
    (folder / "model" / "config.json").write_text(json.dumps(asdict(config)))
    ByteTokenizer().save(folder / "tokenizer")
    files = [file for file in folder.rglob("*") if file.is_file()]
    records = {str(f.relative_to(folder)): manifest.record(f) for f in files}
    manifest.write(folder, step, records)
    return folder
