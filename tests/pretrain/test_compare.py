"""`rondo compare`: command line, tables, and a small comparison of whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rondo.errors import UserError
from rondo.parallel.mesh import rank_device
from rondo.pretrain import compare
from rondo.pretrain.compare import main, parse_words
from rondo.pretrain.compare_report import markdown, page, results
from rondo.pretrain.data import Batch
from rondo.tests.evals.test_continual import noting_device

SCORES = {
    ("a", 0): {5: {"en": 3.0, "de": 5.0}, 10: {"en": 2.0, "de": 4.0}},
    ("a", 1): {5: {"en": 3.0, "de": 5.0}, 10: {"en": 2.4, "de": 4.0}},
    ("b", 0): {5: {"en": 3.0, "de": 5.0}, 10: {"en": 1.9, "de": 4.2}},
    ("b", 1): {5: {"en": 3.0, "de": 5.0}, 10: {"en": 2.3, "de": 4.4}},
}


def row(data: dict, value: str, step: int, domain: str) -> dict:
    key = {"value": value, "step": step, "domain": domain}
    [found] = [each for each in data["rows"] if key.items() <= each.items()]
    return found


@pytest.mark.quick
def test_means_deviations_and_paired_differences() -> None:
    data = results("x", ["a", "b"], [0, 1], SCORES)
    english = row(data, "b", 10, "en")
    assert english["mean"] == pytest.approx(2.1)
    assert english["deviation"] == pytest.approx(math.sqrt(0.08))
    # Seeds differ by 0.4, the two values within a seed always by 0.1.
    assert english["difference"]["mean"] == pytest.approx(-0.1)
    assert english["difference"]["deviation"] == pytest.approx(0, abs=1e-12)
    both = row(data, "b", 10, "mean")
    assert both["losses"] == pytest.approx({0: 3.05, 1: 3.35})
    assert both["difference"]["mean"] == pytest.approx(0.1)
    assert row(data, "a", 5, "de")["difference"] == {"mean": 0, "deviation": 0}


@pytest.mark.quick
def test_table_and_picture() -> None:
    data = results("x", ["a", "b"], [0, 1], SCORES)
    lines = markdown(data).splitlines()
    assert lines[4] == "| | en | de | mean |" and "at step 10" in lines[2]
    assert lines[7].startswith("| b | 2.1000 ± 0.2828 (-0.1000 ± 0.0000) | 4.3000")
    assert page(data).count("<polyline") == 3 * 2
    assert "over 2 seeds. In" in lines[2] and "missing" not in page(data)


@pytest.mark.quick
def test_what_is_not_finished_is_named_and_not_counted() -> None:
    scores = {key: SCORES[key] for key in (("a", 0), ("b", 0), ("a", 1))}
    data = results("x", ["a", "b"], [0, 1], scores)
    assert data["missing"] == [["b", 1]]
    lines = markdown(data).splitlines()
    assert lines[2].endswith("3 of 4 runs are finished; missing: b with seed 1.")
    assert lines[6].startswith("| a | 2.2000 ± ")
    assert lines[7].startswith("| b (1 of 2 seeds) | 1.9000 (-0.1000) |")
    assert "missing: b with seed 1." in page(data) and "b (1 of 2 seeds)" in page(data)
    alone = markdown(results("x", ["a", "b"], [0], {("a", 0): SCORES["a", 0]}))
    assert "| a | 2.0000 |" in alone and "over 1 seed." in alone and "missing: b with" in alone


@pytest.mark.quick
def test_command_line() -> None:
    words = ["r.yaml", "--vary", "optimizer.lr", "1e-3", "2e-3", "--seeds", "2", "--steps=3"]
    expected = ("r.yaml", "optimizer.lr", ["1e-3", "2e-3"], 2, ["--steps=3"])
    assert parse_words(words) == expected
    for wrong, message in (
        (["r.yaml"], "vary: required"),
        (["r.yaml", "--vary", "seed", "1"], "two or more"),
        (["r.yaml", "--vary", "steps", "1", "1"], "different"),
        (["--vary", "steps", "1", "2"], "one recipe"),
        (["r.yaml", "--vary", "steps", "1", "2", "--seeds", "0"], "seeds: expected"),
    ):
        with pytest.raises(UserError, match=message):
            parse_words(wrong)


@pytest.mark.quick
def test_every_rank_has_a_gpu_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rank_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert rank_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"rank 2 .* has no GPU of its own \(2 found\)"):
        rank_device()


def test_runs_are_compared_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, used = torch.device("cpu", 0), []  # any that `load` has not by itself
    monkeypatch.setattr(compare, "rank_device", lambda: device)
    for owner, name in ((compare, "load"), (Batch, "to")):
        monkeypatch.setattr(owner, name, noting_device(getattr(owner, name), used))
    for name, word in (("en", "hello world"), ("de", "guten Tag")):
        lines = (json.dumps({"text": f"{word} {i}. " * 20}) for i in range(30))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = ", ".join(f"{{path: {tmp_path}/{name}.jsonl}}" for name in ("en", "de"))
    words = ["tiny", "--vary", "reweight.strategy", "uniform", "linupper", "--seeds=2"]
    words += [
        "--steps=4",
        "--schedule.warmup_steps=0",
        "--checkpoint.every=2",
        "--evals.batches=1",
        "--model.dim=32",
    ]
    words += ["--model.num_layers=1", "--model.pattern=[gla]", "--data.sequence_length=32"]
    words += [f"--data.sources=[{sources}]", "--data.validation_fraction=0.3"]
    words += [f"--data.folder={tmp_path}/data", f"--output_dir={tmp_path}/runs"]
    words += ["--logging.tensorboard=false", "--logging.norms_every=0"]
    assert main(words) == 0
    folder = tmp_path / "runs" / "tiny"
    data = json.loads((folder / "compare.json").read_text())
    assert len(data["rows"]) == 2 * 2 * 3  # values, steps, domains and their mean
    for each in data["rows"]:
        assert len(each["losses"]) == 2 and 0 < each["mean"] < 8
    # 4 runs of 2 checkpoints, a batch of each domain; the batches go where the model is.
    assert used.count(device) + used.count(torch.device("cpu")) == 4 * 2 * (1 + 2)
    assert used.count(device) >= 4 * 2
    final = {each["value"]: each for each in data["rows"] if each["step"] == 4}
    assert final["uniform"]["losses"] != final["linupper"]["losses"]
    assert (folder / "compare.html").is_file()
    # Started again, nothing is trained: what is there is all that is needed.
    metrics = folder / "linupper-seed1" / "metrics.jsonl"
    metrics.unlink()
    assert main(words) == 0 and not metrics.exists()
    assert json.loads((folder / "compare.json").read_text()) == data
    with pytest.raises(UserError, match=r"recipe \(optimizer\.lr: 0\.001 there, 0\.5 now\)"):
        main([*words, "--optimizer.lr=0.5"])
    with pytest.raises(UserError, match="folders of their own"):
        main(["tiny", "--vary", "seed", "1", "2"])
