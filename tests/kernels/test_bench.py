"""The benchmark of the kernels: what it times runs, on a CPU too, and it refuses without a GPU."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rondo.kernels.bench import __main__ as bench
from rondo.kernels.bench import cases, mixtures, order, peers, table, timing
from rondo.kernels.bench.order import Key
from rondo.kernels.bench.worker import Failure, failure
from rondo.kernels.conv_library import library_serves

CPU = torch.device("cpu")
BEST = {"bytes": 1e6, "flops": 1e6}
SMALL = cases.Preset(16, 40, 2, 8, 4, 2, 8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.PRESETS, "1.3b", SMALL)
    monkeypatch.setattr(timing, "milliseconds", lambda run, device: (run(), 2.0)[1])


class Here:
    """Does in this process what a worker does in another; `takes` seconds of a clock go by."""

    def __init__(self, takes: float = 0.0) -> None:
        self.now, self.takes = 0.0, takes

    def ask(self, seconds: float, function: Any, *arguments: Any) -> Any:
        assert seconds > 0
        self.now += self.takes
        try:
            return function(*arguments)
        except Exception as error:
            raise Failure(*failure(error)) from None

    def close(self) -> None:
        """Nothing is held."""


def timed(worker: Any, seconds: float = math.inf) -> bench.Bench:
    return bench.Bench(worker, CPU, BEST, seconds, clock=lambda: worker.now)


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
    forward, both = timed(Here()).rows(Key(operator, "1.3b", 2, 6))
    place = f"test_bench.py:{failing.__code__.co_firstlineno + 1}"
    assert (forward["direction"], both["direction"]) == ("forward", "both")
    assert both["bandwidth"] > forward["bandwidth"] > 0
    assert both["peers"] == {
        "itself": 2.0,
        "absent": "not installed",
        "broken": f"failed: RuntimeError: heads must be ... many ({place})",
    }
    assert "itself 1.00x, absent -, broken -" in table.line(both)
    named = backends(operator)
    assert (forward["backend"], both["backend"]) == (named, named)
    assert f"| both | {named} | 2.000 |" in table.line(both)
    assert json.loads(json.dumps(both)) == both


def backends(operator: str) -> str:
    """What ours runs on, on a CPU."""
    if operator == "short_conv":
        served = library_serves(torch.empty(1, dtype=torch.bfloat16), None)
        return "library" if served else "chunked"
    return "grouped_mm" if operator == "expert_products" else "chunked"


@pytest.mark.parametrize(
    ("operator", "peer"),
    [
        *(("gather_rows", "torch"), ("combine_rows", "torch"), ("lstm", "torch")),
        *(("expert_products", "torch"), ("expert_products", "loop")),
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
    assert {key.length for key in order.ordered(["lstm"], ["1.3b"])} == {2048, 8192}
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
    bench_here = timed(Here())
    bench_here.best = {"bytes": 2 * one / 1e-3, "flops": case.flops / 2e-3}
    row = bench_here.rows(Key("attention", "1.3b", 2, 6))[0]
    assert row["bandwidth"] == pytest.approx(1.0)
    assert row["compute"] == pytest.approx(1.0)


def test_bytes_and_flops_of_the_products_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first product of a mixture of two experts a token, each of the model's width."""
    monkeypatch.setattr(mixtures, "EXPERTS", 3)
    monkeypatch.setattr(mixtures, "TOP_K", 2)
    case = cases.make_case("expert_products", "1.3b", 2, 6, CPU)
    output = case.run(**case.inputs)
    rows, weight = 2 * 2 * 6, 3 * (2 * 16) * 16
    assert tuple(output.shape) == (rows, 32)
    assert case.flops == 2 * rows * 16 * 32
    assert case.bytes(output, False) == 2 * (rows * 16 + weight + rows * 32)
    assert case.bytes(output, True) == 2 * (3 * (rows * 16 + weight) + 2 * rows * 32)


def test_gradients_of_the_products_of_experts_are_torchs() -> None:
    case = cases.make_case("expert_products", "1.3b", 2, 6, CPU)
    inputs = [x.detach().float().requires_grad_() for x in case.inputs.values()]
    upstream = torch.randn(case.run(*inputs).shape, generator=torch.Generator().manual_seed(0))
    theirs = peers.PEERS["expert_products"]["torch"]()(*inputs, **case.extra)
    expected = torch.autograd.grad(theirs, inputs, upstream)
    actual = torch.autograd.grad(case.run(*inputs), inputs, upstream)
    torch.testing.assert_close(actual, expected)


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


def test_the_most_telling_cases_come_first() -> None:
    keys = order.ordered(list(cases.OPERATORS), ["1.3b", "7b"])
    assert len(set(keys)) == len(keys) == 154
    among = [o for o in cases.OPERATORS if order.shared(o)]
    assert {"delta_rule_key_decay", "attention", "linear_scan"} < set(among)
    assert not order.shared("para_gru") and not order.shared("neural_memory")
    every = len(cases.OPERATORS)
    assert [key.operator for key in keys[:every]] == [
        *among, *(o for o in cases.OPERATORS if o not in among),
    ]  # fmt: skip
    assert {(key.preset, key.length) for key in keys[: len(among)]} == {("1.3b", 8192)}
    following = keys[every : every + 3 * len(among)]
    assert {(key.preset, key.length) for key in following[: len(among)]} == {("7b", 8192)}
    assert {(key.preset, key.length) for key in following[len(among) :]} >= {
        *(("1.3b", 2048), ("7b", 2048)),
    }
    rest = [key for key in keys[every:] if key.operator not in among]
    assert keys[-len(rest) :] == rest


def test_stops_when_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock by which ours takes a second, and so does a peer."""
    monkeypatch.setitem(peers.PEERS, "rms_norm", {"torch": peers.PEERS["rms_norm"]["torch"]})
    keys, kept = order.ordered(["rms_norm"], ["1.3b"], ((1, 4), (2, 4), (3, 4))), []
    worker = Here(takes=1.0)
    rows = timed(worker, 2.5).run(keys, lambda rows, left: kept.append((len(rows), left)))
    assert [row["shape"] for row in rows] == ["1 x 4"] * 2 + ["2 x 4"] * 2
    assert kept == [(2, 2), (4, 1)]  # written after every case
    assert rows[-1]["peers"] == {"torch": "the time was up"}
    assert "the time is up: 1 of 3 cases left out" in capsys.readouterr().out


class Breaks(Here):
    """A worker that fails one operator, and whose process a peer of another ends."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Any, ...]] = []

    def ask(self, seconds: float, function: Any, *arguments: Any) -> Any:
        self.asked.append(arguments[:-1])
        operator, _, batch, _, party, _ = arguments
        if (operator, party) == ("rms_norm", "ours") and batch == 1:
            raise Failure("RuntimeError: no such | kernel")
        if (operator, party, batch) == ("short_conv", "ours", 1):
            raise Failure("out of memory: 3 GiB", "memory")
        if (operator, party) == ("linear_scan", "fla"):
            raise Failure("took longer than 60 s", fatal=True)
        return super().ask(seconds, function, *arguments)


def test_compiles_beforehand_what_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Key] = []
    make = timing.make_case

    def small(*key: Any) -> cases.Case:
        made.append(Key(*key[:4]))
        return make(*key[:2], 1, 4, CPU)

    monkeypatch.setattr(timing, "make_case", small)
    monkeypatch.setattr(bench, "Worker", Here)
    bench.compile_all(["lstm", "rms_norm"], ["1.3b"], CPU, math.inf, 2)
    parties = ["ours", "torch"]  # of both; there are no other packages
    assert sorted(made) == sorted(
        [Key("lstm", "1.3b", 8, 2048)] * 3  # and a loop
        + [Key("rms_norm", "1.3b", *shape) for shape in ((8, 2048), (1, 16384)) for _ in parties]
    )
    made.clear()
    bench.compile_all(["rms_norm"], ["1.3b"], CPU, -1.0, 2)
    assert made == [] and capsys.readouterr().out == ""


def test_one_failure_leaves_the_others() -> None:
    worker = Breaks()
    keys = order.ordered(["rms_norm", "short_conv", "linear_scan"], ["1.3b"], ((1, 4), (2, 4)))
    rows = timed(worker).run(keys, lambda rows, left: None)
    found = {(row["operator"], row["shape"], row["direction"]): row for row in rows}
    assert len(found) == 12
    broken = found["rms_norm", "1 x 4", "both"]
    assert (broken["milliseconds"], broken["error"]) == (
        None,
        "failed: RuntimeError: no such | kernel",
    )
    assert broken["peers"]["torch"] == 2.0
    assert "| failed: RuntimeError: no such / kernel | | | torch 2.000 ms" in table.line(broken)
    assert found["short_conv", "1 x 4", "both"]["error"] == "out of memory"
    assert found["rms_norm", "2 x 4", "both"]["milliseconds"] == 2.0
    # What hung once is not waited for again; what is not installed is not looked for again.
    scans = [found["linear_scan", shape, "both"]["peers"] for shape in ("1 x 4", "2 x 4")]
    assert scans == [
        {"fla": "failed: took longer than 60 s"},
        {"fla": "failed: took longer than 60 s (at 1 x 4)"},
    ]
    asked = [key for key in worker.asked if key[0] == "linear_scan" or key[4] == "liger"]
    assert [key[4] for key in asked if key[2] == 2] == ["ours"]


@pytest.mark.parametrize("broken", [False, True])
def test_writes_what_it_prints(
    broken: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All that `make gpu` does of it, but for the device."""
    make = timing.make_case

    def on_cpu(operator: str, preset: str, batch: int, length: int, device: Any) -> cases.Case:
        assert device == torch.device("cuda", 0)
        if broken and operator == "para_gru":
            raise RuntimeError("no such kernel")
        return make(operator, preset, 1, 4, CPU)

    monkeypatch.setattr(timing, "make_case", on_cpu)
    monkeypatch.setattr(bench, "Worker", Here)
    for name, value in {"is_available": True, "get_device_name": "Some Chip 9"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)
    monkeypatch.setattr(timing, "ceilings", lambda device: {"bytes": 1e12, "flops": 1e14})
    command = ["bench", "--operators", "para_gru", "rms_norm", "--out", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", [*command, "--presets", "1.3b"])
    assert bench.main() == int(broken)
    path = tmp_path / "new" / "kernels-some-chip-9"
    found = json.loads(path.with_suffix(".json").read_text())
    assert found["left_out"] == 0
    versions = torch.__version__, table.triton_version()
    assert (found["torch"], found["triton"]) == versions
    names = [row["operator"] for row in found["rows"]]
    assert names == ["rms_norm"] * 2 + ["para_gru"] * 2 + ["rms_norm"] * 6 + ["para_gru"] * 6
    text = path.with_suffix(".md").read_text()
    assert text.startswith("Some Chip 9, torch {}, triton {}: ".format(*versions))
    assert "1.00 TB/s, 100 TFLOP/s" in text
    said = capsys.readouterr()
    lines = [each for each in text.splitlines() if each.startswith("| ")]
    assert len(lines) == 18 and all(each in said.out for each in lines)
    if broken:
        place = f"test_bench.py:{on_cpu.__code__.co_firstlineno + 3}"
        assert f"| | failed: RuntimeError: no such kernel ({place}) | | | chunked -" in lines[4]
        assert said.err.endswith(f"\npara_gru: failed: RuntimeError: no such kernel ({place})\n")
    else:
        assert "chunked 1.00x |" in lines[4]


def test_ceilings_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    best = timing.ceilings(CPU, 32)
    assert min(best.values()) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith("no CUDA device here, and nothing else to time")
    assert not (tmp_path / "out").exists()
