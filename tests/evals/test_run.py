"""`rondo eval`: results are lm-eval's, made once, and those of the model token by token."""

from __future__ import annotations

import json
import math
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from rondo.errors import UserError
from rondo.evals.tasks import examples
from rondo.launch import eval_job
from rondo.launch.cli import main as rondo
from rondo.launch.eval_records import EvalRecord
from rondo.models import load
from rondo.pretrain.data.tokenizer import ByteTokenizer
from rondo.tests.distributed.spawn import run_ranks
from rondo.tests.evals.runs import write_run

pytest.importorskip("lm_eval")
TASKS = "bits_per_byte,parity_12,passkey_300"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    (folder / "text.txt").write_text("A text.\n\nOf a few words, häßliche too.\n" * 3)
    words = ["eval", str(folder), "--tasks", TASKS, "--samples", "8", "--text"]
    assert rondo([*words, str(folder / "text.txt"), "--batch_size", "3"]) == 0
    return folder


def results(run: Path, task: str) -> dict[str, Any]:
    return json.loads((run / "evals" / "step-000000010" / f"{task}.json").read_text())


@torch.no_grad()
def log_likelihood(run: Path, context: list[int], ids: list[int]) -> float:
    model = load(run / "checkpoints" / "step-000000010").eval()
    row = torch.tensor([context + ids])
    nats = model.loss(row[:, :-1], row[:, 1:], reduction="none").flatten()
    return -float(nats[len(context) - 1 :].double().sum())


def test_numbers_are_those_of_the_model(run: Path) -> None:
    text = (run / "text.txt").read_bytes()
    bits = -log_likelihood(run, [256], [*text]) / len(text) / math.log(2)
    found = results(run, "bits_per_byte")["results"]["bits_per_byte"]
    assert found["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert found["byte_perplexity,none"] == pytest.approx(2**bits, rel=1e-5)

    encode = ByteTokenizer().encode
    texts = list(islice(examples("parity", 12, "test"), 8))
    each = [log_likelihood(run, encode(t.prompt), encode(t.answer)) for t in texts]
    found = results(run, "parity_12")
    assert found["results"]["parity_12"]["perplexity,none"] == pytest.approx(
        math.exp(-sum(each) / 8), rel=1e-5
    )
    assert 0 <= found["results"]["parity_12"]["acc,none"] <= 1
    assert found["n-samples"]["parity_12"] == {"original": 8, "effective": 8}
    assert found["versions"]["parity_12"] == 1.0
    assert found["config"]["model_args"].endswith("step-000000010")


def test_a_result_is_made_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((run / "evals").rglob("*"))
    before = [(file, file.stat().st_mtime_ns) for file in files]
    words = ["eval", str(run), "--step", "10", "--tasks", TASKS, "--samples", "8"]
    words += ["--text", str(run / "text.txt")]
    assert rondo([*words, "--batch_size", "1"]) == 0
    assert "byte_perplexity" in capsys.readouterr().out
    assert [(f, f.stat().st_mtime_ns) for f in sorted((run / "evals").rglob("*"))] == before
    assert rondo([*words, "--limit", "2"]) == 2
    assert "made with limit=None, not 2; --overwrite" in capsys.readouterr().err
    target = run / "elsewhere"
    words[words.index(TASKS)] = "parity_12"
    assert rondo([*words, "--limit", "2", "--output", str(target)]) == 0
    mtime = (file := target / "step-000000010" / "parity_12.json").stat().st_mtime_ns
    assert rondo([*words, "--limit", "2", "--output", str(target), "--overwrite"]) == 0
    assert file.stat().st_mtime_ns > mtime
    assert json.loads(file.read_text())["n-samples"]["parity_12"]["effective"] == 2


def test_passkeys_of_a_limit_are_at_all_depths(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rondo.evals.adapter import HarnessModel

    depths: list[float] = []
    score = HarnessModel.loglikelihood

    def noted(model: HarnessModel, requests: list[Any]) -> Any:
        prompts = [request.args[0] for request in requests]
        depths.extend(prompt.index("Remember it.") / len(prompt) for prompt in prompts)
        return score(model, requests)

    monkeypatch.setattr(HarnessModel, "loglikelihood", noted)
    words = ["eval", str(run), "--tasks", "passkey_2000", "--limit", "10", "--output"]
    assert rondo([*words, str(run / "limited")]) == 0
    assert len(depths) == 10 and min(depths) < 0.15 and max(depths) > 0.85


def test_tensorboard_has_the_numbers(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / "evals")).Reload()
    (event,) = events.Scalars("evals/bits_per_byte/bits_per_byte")
    value = results(run, "bits_per_byte")["results"]["bits_per_byte"]["bits_per_byte,none"]
    assert event.step == 10 and event.value == pytest.approx(value, rel=1e-6)


def test_loss_and_states_by_position(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run / "recipe.yaml").write_text("data: {sequence_length: 16}\n")
    words = [
        "eval",
        str(run),
        "--tasks",
        "positions_50,newlines_50",
        "--text",
        str(run / "text.txt"),
    ]
    assert rondo([*words, "--samples", "2"]) == 0
    found = results(run, "positions_50")
    values = found["results"]["positions_50"]
    assert values["perplexity,none"] == pytest.approx(math.exp(values["loss,none"]))
    assert {"collapse,none", "state_growth,none"} <= values.keys()
    assert found["n-samples"]["positions_50"]["effective"] == 2
    events = EventAccumulator(str(run / "tensorboard" / "evals")).Reload()
    found_too = results(run, "newlines_50")
    assert found_too["n-samples"]["newlines_50"]["effective"] == 1
    assert found_too["curves"].keys() == found["curves"].keys()
    (event,) = events.Scalars("evals/positions_50/loss/0000032")
    assert event.value == pytest.approx(found["curves"]["loss"]["32"], rel=1e-6)


def _on_a_rank(run: str) -> int:
    os.environ["RONDO_DEBUG"] = "1"
    words = ["eval", run, "--tasks", "parity_12,bits_per_byte", "--samples", "5", "--output"]
    return rondo([*words, f"{run}/ranks", "--text", f"{run}/text.txt"])


def test_ranks_share_the_samples(run: Path) -> None:
    one = ["eval", str(run), "--tasks", "parity_12", "--samples", "5", "--output", f"{run}/one"]
    assert rondo([*one, "--text", f"{run}/text.txt"]) == 0
    assert run_ranks(_on_a_rank, 2, str(run)) == [0, 0]
    found, wanted = (
        json.loads((run / kind / "step-000000010" / "parity_12.json").read_text())
        for kind in ("ranks", "one")
    )
    for metric, value in wanted["results"]["parity_12"].items():
        if "," in metric and "stderr" not in metric:
            assert found["results"]["parity_12"][metric] == pytest.approx(value, rel=1e-6)


@pytest.mark.slow
def test_a_job_of_two_ranks(tmp_path: Path) -> None:
    """They share the samples: each has a log, and there is one result."""
    write_run(tmp_path)
    words = [str(tmp_path), "--step=10", "--tasks=parity_12", "--retries=0", "--processes=2"]
    assert eval_job.main([*words, "--", "--samples", "5", "--device", "cpu"]) == 0
    one = ["eval", str(tmp_path), "--tasks", "parity_12", "--samples", "5", "--device", "cpu"]
    assert rondo([*one, "--output", str(tmp_path / "one")]) == 0
    both, alone = (
        json.loads((folder / "step-000000010" / "parity_12.json").read_text())["results"]
        for folder in (tmp_path / "evals", tmp_path / "one")
    )
    assert both["parity_12"]["acc,none"] == alone["parity_12"]["acc,none"]
    record = EvalRecord(tmp_path, 10)
    assert (record.job["state"], record.job["attempts"]) == ("done", 1)
    logs = sorted((record.folder / "ranks").iterdir())
    assert [path.name for path in logs] == ["rank-000.log", "rank-001.log"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "party_3"], "unknown task 'party_3' (nearest: "),
        (["--tasks", ","], "tasks: at least one name"),
        (["--tasks", "parity_12", "--step", "3"], "no checkpoint"),
        (["--tasks", "parity_12", "--samples", "0"], "samples: must be at least 1, got 0"),
        (["--tasks", "piqa", "--data_dir", "nowhere"], "data_dir: nowhere is no folder"),
    ],
)
def test_refusals(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert rondo(["eval", str(run), *words]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_without_the_extra(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert rondo(["eval", str(run), "--tasks", "s3_4"]) == 2
    assert "pip install lm_eval" in capsys.readouterr().err


def test_data_folder_errors(tmp_path: Path) -> None:
    from rondo.evals.local_data import find_file, read_rows

    with pytest.raises(UserError, match=r"expected one piqa.jsonl .* found nothing"):
        find_file(tmp_path, "piqa")
    file = tmp_path / "copa.jsonl"
    file.write_text('{"query": "a", "choices": ["b"], "gold": 0}\n')
    with pytest.raises(UserError, match="copa needs those of its own data set"):
        read_rows(file, "copa")
    file.write_text("{")
    with pytest.raises(UserError, match=r"copa.jsonl:1: "):
        read_rows(file, "copa")
