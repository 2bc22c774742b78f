"""Runs that begin with a checkpoint, or parameters, of another run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import Tensor

from rondo.errors import UserError
from rondo.models.loading import find_checkpoint, read_tensors
from rondo.pretrain import load_recipe, train
from rondo.pretrain.data.tokenizer import ByteTokenizer
from rondo.pretrain.start import check_tokenizer

FROZEN, BIASED = "--model.ffns.moe.freeze_router=true", "--model.ffns.moe.bias_rate=0.01"
BIASES = {"blocks.0.ffn.balance_bias", "blocks.1.ffn.balance_bias"}


def run(folder: Path, name: str, steps: int, *options: str) -> dict[str, Tensor]:
    """Trains up to a step; the tensors of the model and the state of its optimizer."""
    small = [
        f"--output_dir={folder}/runs",
        f"--data.folder={folder}/data",
        f"--name={name}",
        f"--steps={steps}",
        "--model.dim=32",
        "--model.num_layers=2",
        "--model.ffns.moe.expert_dim=16",
        "--data.sequence_length=64",
        "--data.global_batch_size=2",
        "--data.micro_batch_size=2",
        "--schedule.warmup_steps=0",
        "--evals.batches=0",
        "--logging.tensorboard=false",
    ]
    assert train(load_recipe("rmoe-tiny", [*small, *options])) == 0
    path = find_checkpoint(folder / "runs" / name)
    return {**read_tensors(path / "model"), **read_tensors(path / "optimizer")}


def test_routers_frozen_and_balanced_by_bias_from_a_run_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, start = run(tmp_path, "base", 2), f"--checkpoint.resume={tmp_path}/runs/base"
    capsys.readouterr()
    frozen = run(tmp_path, "frozen", 4, start, FROZEN, BIASED)
    said = capsys.readouterr().err
    assert said.count("begins fresh: blocks.0.ffn.balance_bias, blocks.1.ffn.balance_bias;") == 1
    assert said.count("left behind: optimizer state of blocks.0.ffn.router.proj.weight, ") == 1
    routers = {name for name in base if "router." in name and name.endswith(("weight", "bias"))}
    assert len(routers) == 8 and all(frozen[name].equal(base[name]) for name in routers)
    assert not any(frozen[name].any() for name in BIASES)
    assert not any("router." in name and name.endswith(".exp_avg") for name in frozen)
    assert frozen["head.weight.step"] == 4 and not frozen["head.weight"].equal(base["head.weight"])

    with pytest.raises(UserError, match=r"router\.proj\.weight\.\w+ .* is missing"):
        run(tmp_path, "frozen", 6, BIASED)  # its own checkpoint must be of the same run
    learns = run(tmp_path, "learns", 6, f"--checkpoint.resume={tmp_path}/runs/frozen", BIASED)
    weight = "blocks.0.ffn.router.proj.weight"
    assert learns[f"{weight}.step"] == 2 and not learns[weight].equal(base[weight])
    assert all(learns[name].any() for name in BIASES)
    capsys.readouterr()
    same = run(tmp_path, "same", 7, f"--checkpoint.resume={tmp_path}/runs/learns", BIASED)
    assert "begins fresh" not in capsys.readouterr().err
    learns = run(tmp_path, "learns", 7, BIASED)
    assert same.keys() == learns.keys()
    assert all(same[name].equal(learns[name]) for name in learns)


SMALL_MEMORY = (
    "--model.pattern=[titans_memory]",
    "--model.mixers.titans_memory.head_dim=16",
    "--model.mixers.titans_memory.chunk_size=8",
)


def test_a_run_begins_with_the_parameters_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On other data, with a new optimizer; and says where it is another model all the same."""
    base = run(tmp_path, "base", 2, *SMALL_MEMORY)
    start = f"--checkpoint.init_from={tmp_path}/runs/base"
    other = ("--seed=5", "--optimizer.lr=1e-12", "--model.mixers.titans_memory.chunk_size=4")
    capsys.readouterr()
    found = run(tmp_path, "other", 1, start, *SMALL_MEMORY, *other)
    said = " ".join(capsys.readouterr().err.split())
    assert "beginning with the parameters of" in said
    assert "another model than the checkpoint's: " in said
    assert "model.mixers.titans_memory.chunk_size: 8 there, 4 here" in said
    assert found["head.weight.step"] == 1
    assert (found["head.weight"] - base["head.weight"]).abs().max() < 1e-6
    run(tmp_path, "other", 2, start, *SMALL_MEMORY, *other)  # goes on from its own
    assert "going on after step 1" in " ".join(capsys.readouterr().err.split())
    same = run(tmp_path, "same", 1, start, *SMALL_MEMORY)
    assert "another model" not in capsys.readouterr().err and same["head.weight.step"] == 1

    with pytest.raises(UserError, match=r"checkpoint\.init_from: a run begins either with"):
        resume = f"--checkpoint.resume={tmp_path}/runs/base"
        run(tmp_path, "both", 1, start, resume, *SMALL_MEMORY)
    with pytest.raises(UserError, match=r"^checkpoint\.init_from: .* neither a checkpoint nor"):
        run(tmp_path, "none", 1, f"--checkpoint.init_from={tmp_path}/runs/nobody")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    ByteTokenizer().save(tmp_path / "tokenizer")
    words = SimpleNamespace(kind="words", vocab_size=1000, fingerprint=lambda: "other")
    message = r"has another tokenizer .bytes, 257 tokens. than data.tokenizer .words, 1,000."
    with pytest.raises(UserError, match=message):
        check_tokenizer(cast(Any, words), tmp_path)
    check_tokenizer(ByteTokenizer(), tmp_path)
