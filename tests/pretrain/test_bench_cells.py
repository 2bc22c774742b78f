"""The benchmarks of nonlinear recurrences run, and say what they measured."""

from __future__ import annotations

import json

import pytest
import torch

from rondo.kernels import newton_rnn
from rondo.kernels.newton_rnn import CELLS
from rondo.pretrain import bench_newton, bench_rnn


@pytest.mark.parametrize(("bench", "rows"), [(bench_newton, 2), (bench_rnn, 6)])
def test_a_line_and_json_for_each_cell(
    bench, rows: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--lengths", "16", "--rounds", "1"])
    bench.main()
    first, *lines = capsys.readouterr().out.strip().splitlines()
    assert first.endswith("threads") and len(lines) == 2 * rows
    for line, text in zip(lines[:rows], lines[rows:], strict=True):
        found = json.loads(text)
        assert found["milliseconds"] > 0 and found["length"] == 16
        assert ("loop over indices" in line) == (bench is bench_newton)
        assert line.startswith(found["cell"]) and f"{found['milliseconds']:.1f} ms" in line


@pytest.mark.parametrize("name", CELLS)
def test_newton_is_timed_against_the_same_computation(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gates = torch.randn(bench_newton.BATCH, 9, 3, bench_newton.WIDTH, generator=generator)
    weights = torch.randn(len(CELLS[name].weights), bench_newton.WIDTH, generator=generator)
    found = bench_newton.indexed_loop(name, gates, weights)
    torch.testing.assert_close(found, newton_rnn(name, gates, weights, backend="reference").h)
