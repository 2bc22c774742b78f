"""The benchmarks of nonlinear recurrences run, and say what they measured."""

from __future__ import annotations

import json

import pytest
import torch

from rondo.kernels import newton_rnn
from rondo.kernels.newton_rnn import CELLS
from rondo.pretrain import bench_newton, bench_rnn


@pytest.mark.parametrize(("bench", "rows"), [(bench_newton, 2), (bench_rnn, 10)])
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


def test_an_lstm_is_timed_against_the_same_computation() -> None:
    """Heads by torch's layer and by the plain loop from the same operands; one head and nn.LSTM."""
    generator = torch.Generator().manual_seed(0)
    heads, dim, width = bench_rnn.HEADS, bench_rnn.WIDTH // bench_rnn.HEADS, bench_rnn.WIDTH
    x = torch.randn(bench_rnn.BATCH, 9, heads, dim, generator=generator)
    weight, recurrent = 0.1 * torch.randn(2, heads, 4, dim, dim, generator=generator)
    expected = bench_rnn.loop_with_inputs(x, weight, recurrent)  # (H, T, B, D)
    for call in (bench_rnn.library, bench_rnn.two_inputs):
        torch.testing.assert_close(call(x, weight, recurrent), expected.transpose(0, 2))
    layer = torch.nn.LSTM(width, width, batch_first=True)
    x = torch.randn(bench_rnn.BATCH, 9, width, generator=generator)
    for ours in (
        bench_rnn.own_lstm(x, *layer.parameters()),
        bench_rnn.own_lstm(x, *layer.parameters(), call=bench_rnn.two_inputs),
        bench_rnn.own_layer("lstm", x, *layer.parameters()),
    ):
        torch.testing.assert_close(ours[:, :, 0], layer(x)[0])
