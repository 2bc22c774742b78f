"""The benchmarks of nonlinear recurrences run, and say what they measured."""

from __future__ import annotations

import json

import pytest

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
        assert line.startswith(found["cell"]) and f"{found['milliseconds']:.1f} ms" in line
