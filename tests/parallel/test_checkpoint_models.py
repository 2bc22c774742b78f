"""A language model read back from a checkpoint, without ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from rondo.errors import UserError
from rondo.models import Decoder, ModelConfig, load
from rondo.parallel.checkpoint import Checkpointer, model_tensors

CONFIG = ModelConfig(
    vocab_size=19, dim=32, num_layers=2, pattern=["attention", "gated_deltanet"], ffn_dim=32
)


def save(folder: Path, config: ModelConfig, **changes: object) -> Decoder:
    """A model saved as step 3, its configuration with `changes`."""
    model = Decoder(config, seed=1)
    described = json.dumps(dataclasses.asdict(config) | changes)
    checkpointer = Checkpointer(folder, keep=0, asynchronous=False)
    files = {"model/config.json": described}
    checkpointer.save(3, {"model": model_tensors([model])}, {}, files)
    return model


@pytest.mark.parametrize("tie", [False, True])
def test_the_model_comes_back(tmp_path: Path, tie: bool) -> None:
    saved = save(tmp_path, dataclasses.replace(CONFIG, tie_embeddings=tie))
    loaded = load(tmp_path / "step-000000003")
    assert loaded.config == saved.config
    for (name, a), (_, b) in zip(saved.named_parameters(), loaded.named_parameters(), strict=True):
        assert a.equal(b) and b.requires_grad, name
    tokens = torch.arange(10)[None]
    assert loaded(tokens).hidden.equal(saved(tokens).hidden)


def test_some_parameters_are_never_cast(tmp_path: Path) -> None:
    save(tmp_path, CONFIG)
    loaded = load(tmp_path / "step-000000003", dtype=torch.bfloat16)
    kept = loaded.float32_names()
    types = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    assert kept
    assert {types[name] for name in kept} == {torch.float32}
    assert {types[name] for name in types.keys() - kept} == {torch.bfloat16}


def test_what_is_no_such_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "vocabulary", CONFIG, vocab_size=20)
    with pytest.raises(UserError, match=r"another model: .*\(19, 32\), expected \(20, 32\)"):
        load(tmp_path / "vocabulary" / "step-000000003")
    save(tmp_path / "key", CONFIG, dimension=3)
    with pytest.raises(UserError, match=r"config.json: .*'dimension'"):
        load(tmp_path / "key" / "step-000000003")
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "step-000000003")
    folder = tmp_path / "vocabulary" / "step-000000003"
    (folder / "state.json").write_text("[]")
    with pytest.raises(UserError, match=r"state\.json has sha256"):
        load(folder)
