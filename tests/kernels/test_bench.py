"""The benchmark of the kernels: what it times runs, on a CPU too, and it refuses without a GPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rondo.kernels.bench import __main__ as bench
from rondo.kernels.bench import cases, peers

CPU = torch.device("cpu")
SMALL = cases.Preset(16, 40, 2, 8, 4, 2, 8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.PRESETS, "1.3b", SMALL)
    monkeypatch.setattr(bench, "milliseconds", lambda run, device: (run(), 2.0)[1])


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_every_operator(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("no such package")

    def failing() -> None:
        raise RuntimeError("heads must be\nmany")

    found = {"itself": lambda: case.run, "absent": missing, "broken": failing}
    case = cases.make_case(operator, "1.3b", 2, 6, CPU)
    if case.extra:  # a peer is given what ours has bound
        found["itself"] = lambda: (
            lambda **given: case.run(**{n: x for n, x in given.items() if n not in case.extra})
        )
    monkeypatch.setitem(peers.PEERS, operator, found)
    forward, both = bench.measure(case, CPU, {"bytes": 1e6, "flops": 1e6})
    assert (forward["direction"], both["direction"]) == ("forward", "both")
    assert both["bandwidth"] > forward["bandwidth"] > 0
    assert both["peers"] == {
        "itself": 2.0,
        "absent": "not installed",
        "broken": "failed: RuntimeError: heads must be",
    }
    assert "itself 1.00x, absent -, broken -" in bench.line(both)
    assert json.loads(json.dumps(both)) == both


@pytest.mark.parametrize(
    ("operator", "peer"),
    [
        *(("gather_rows", "torch"), ("combine_rows", "torch"), ("lstm", "torch")),
        *(("slstm", "loop"), ("para_gru", "chunked"), ("para_lstm", "chunked")),
        *(("fast_weights", "chunked"), ("neural_memory", "chunked")),
    ],
)
def test_peers_from_torch_compute_the_same(operator: str, peer: str) -> None:
    case = cases.make_case(operator, "1.3b", 2, 6, CPU)
    inputs = {name: x.detach().float() for name, x in case.inputs.items()}
    found = peers.PEERS[operator][peer]()(**inputs, **case.extra)
    torch.testing.assert_close(found, case.run(**inputs), rtol=1e-4, atol=1e-5)


def test_loops_are_timed_on_short_rows_alone() -> None:
    best, long = {"bytes": 1e6, "flops": 1e6}, 2 * cases.LONGEST["lstm"]
    assert bench.run(["lstm"], ["1.3b"], ((1, long),), CPU, best, math.inf) == []
    gates = torch.zeros(1, 1, 4, 1, 8).expand(1, peers.LONGEST_LOOP + 1, 4, 1, 8)
    with pytest.raises(ValueError, match="not timed beyond 2048 positions"):
        peers.PEERS["lstm"]["loop"]()(gates, torch.zeros(4, 1, 8, 8))


def test_bytes_and_flops() -> None:
    case = cases.make_case("attention", "1.3b", 2, 6, CPU)
    one = 2 * 6 * 2 * 8 * 2  # a bfloat16 tensor of batch, time, heads and dim
    output = case.run(**case.inputs)
    assert (case.bytes(output, False), case.bytes(output, True)) == (4 * one, 11 * one)
    assert case.flops == 2 * 2 * (2 * 6 * 6 * 8 * 2) / 2  # two products, half of each masked
    # A copy of the output and a product of the same work are at the ceiling.
    row = bench.measure(case, CPU, {"bytes": 2 * one / 1e-3, "flops": case.flops / 2e-3})[0]
    assert row["bandwidth"] == pytest.approx(1.0)
    assert row["compute"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("operator", "mixer", "options", "convolutions"),
    [
        ("para_gru", "para_gru", {"num_heads": 2, "conv_width": 1}, 2 * 16 * (3 * 8 + 1)),
        ("para_lstm", "para_lstm", {"num_heads": 2, "conv_width": 1}, 2 * 16 * (3 * 8 + 1)),
        ("fast_weights", "lact", {"num_heads": 1, "window": 1, "chunk_size": 3}, 4 * 16),
        ("neural_memory", "titans_memory", {"head_dim": 16, "conv_width": 1}, 6 * 16),
    ],
)
def test_flops_are_those_of_the_mixer(
    operator: str, mixer: str, options: dict[str, int], convolutions: int
) -> None:
    """But for what the mixer adds: convolutions of one tap, the products that make gates, a window
    of one key."""
    from rondo.models import MIXERS, ModelConfig
    from rondo.models.config import make_options

    config = ModelConfig(dim=16, num_layers=1, pattern=[mixer], mixers={mixer: options})
    layer = MIXERS[mixer](config, make_options(mixer, options), 0)
    case = cases.make_case(operator, "1.3b", 2, 6, CPU)
    assert case.flops / (2 * 6) == pytest.approx(layer.operator_flops(6) - convolutions)


def test_stops_when_the_time_is_up(capsys: pytest.CaptureFixture[str]) -> None:
    best = {"bytes": 1e6, "flops": 1e6}
    shapes = ((1, 4), (2, 4))
    rows = bench.run(["rms_norm"], ["1.3b"], shapes, CPU, best, math.inf)
    assert [row["shape"] for row in rows] == ["1 x 4"] * 2 + ["2 x 4"] * 2
    assert bench.run(["rms_norm"], ["1.3b"], shapes, CPU, best, -1.0) == []
    assert "2 of 2 cases left out" in capsys.readouterr().out


def test_writes_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that `make gpu` does of it, but for the device."""
    measured = bench.run

    def on_cpu(operators: list[str], *others: Any) -> list[dict[str, Any]]:
        return measured(operators, ["1.3b"], ((1, 4),), CPU, *others[3:])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Chip 9")
    monkeypatch.setattr(bench, "ceilings", lambda device: {"bytes": 1e12, "flops": 1e14})
    monkeypatch.setattr(bench, "run", on_cpu)
    command = ["bench", "--operators", "para_gru", "rms_norm", "--out", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", command)
    assert bench.main() == 0
    path = tmp_path / "new" / "kernels-some-chip-9"
    found = json.loads(path.with_suffix(".json").read_text())
    assert [row["operator"] for row in found["rows"]] == ["para_gru"] * 2 + ["rms_norm"] * 2
    table = path.with_suffix(".md").read_text()
    assert table.startswith("Some Chip 9, torch")
    assert "1.00 TB/s, 100 TFLOP/s" in table
    said = capsys.readouterr().out
    lines = [text for text in table.splitlines() if text.startswith("| ")]
    assert len(lines) == 6 and all(text in said for text in lines)
    assert "chunked 1.00x |" in lines[2]


def test_ceilings_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    best = bench.ceilings(CPU, 32)
    assert min(best.values()) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rondo.kernels.bench", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("no CUDA device here, and nothing else to time")
    assert not (tmp_path / "out").exists()
