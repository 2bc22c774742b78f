"""`make bench` measures two models of one size that both learn."""

from __future__ import annotations

import json

import pytest
import torch

from rondo.pretrain import bench

pytest.importorskip("transformers")


@pytest.mark.parametrize("contest", bench.CONTESTS, ids=lambda contest: contest.name)
def test_a_contest_is_of_equals(contest: bench.Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many parameters, but for norms and gates, and losses that fall alike."""
    for name, value in (("VOCAB", 256), ("LAYERS", 4), ("BATCH", 1), ("TIME", 64)):
        monkeypatch.setattr(bench, name, value)
    found = bench.run(contest, "eager", 1, 1e12)
    assert found["our_parameters"] == pytest.approx(found["their_parameters"], rel=0.03)
    assert found["ratio"] == pytest.approx(
        found["our_tokens_per_second"] / found["their_tokens_per_second"]
    )
    assert found["peak_flops"] >= 1e12  # what was measured before counts
    tokens = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(0))
    for step in (
        bench.our_step(contest.ours(), tokens),
        bench.their_step(contest.theirs(), tokens),
    ):
        losses = [step() for _ in range(12)]
        assert 5 < losses[0] < 8 and losses[-1] < losses[0] - 0.1


def test_the_command_prints_a_line_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the contests and modes that were asked for."""
    seen = []

    def run(contest: bench.Contest, mode: str, rounds: int, peak: float) -> dict[str, object]:
        seen.append((contest.name, mode, rounds))
        speeds = {"our_tokens_per_second": 3e3, "their_tokens_per_second": 2e3, "ratio": 1.5}
        others = {"ratio_both_reusing_memory": 1.25, "ratio_neither_reusing_memory": 1.4}
        shares = {"our_share_of_peak": 0.3, "their_share_of_peak": 0.2, "peak_flops": 1e12}
        return {"contest": contest.name, **speeds, **others, **shares}

    monkeypatch.setattr(bench, "run", run)
    words = ["bench", "--modes", "eager", "--rounds", "2", "--only", "attention"]
    monkeypatch.setattr("sys.argv", words)
    bench.main()
    assert seen == [("attention", "eager", 2)]
    first, line, last = capsys.readouterr().out.strip().splitlines()
    assert "threads" in first and "ratio 1.50 (1.25, 1.40)" in line
    assert "30% vs 20% of 1,000 GFLOP/s" in line
    assert json.loads(last)["ratio"] == 1.5
