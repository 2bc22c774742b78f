"""`rondo plan`: counts by hand, schedules, search, page and command."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from rondo.errors import UserError
from rondo.models import Decoder
from rondo.parallel.mesh import SHARDED, Layout
from rondo.parallel.plan.estimate import make_plan
from rondo.parallel.plan.hardware import find_hardware
from rondo.parallel.plan.job import trace_rank
from rondo.parallel.plan.page import plan_page
from rondo.parallel.plan.recorder import Traffic
from rondo.parallel.plan.schedule import bubble, in_flight
from rondo.parallel.plan.search import search
from rondo.pretrain.plan import main
from rondo.tests.distributed.plan_cases import LENGTH, MICRO, MICRO_BATCHES, job

LAYERS = 4
RECIPE = """
name: small
model:
  vocab_size: 256
  dim: 64
  num_layers: 4
  pattern: [gated_deltanet, attention]
  mixers: {gated_deltanet: {num_heads: 4, head_dim: 16}, attention: {num_heads: 4}}
data: {sequence_length: 64, global_batch_size: 32, micro_batch_size: 1}
"""


def test_collectives_of_sharded_parameters() -> None:
    run = job(Layout(dp_shard=4))
    traffic = trace_rank(run, 0).traffic
    model = Decoder(run.config)
    blocks = sum(_fsdp_bytes(block) for block in model.blocks.values())
    whole = _fsdp_bytes(model)
    others = 3 / 4  # of the ranks
    # Blocks are gathered for both passes, what is around them once.
    gathers = MICRO_BATCHES * (1 + 2 * LAYERS), MICRO_BATCHES * (whole + blocks) * others
    assert traffic["all-gather", SHARDED] == pytest.approx(gathers)
    assert traffic["reduce-scatter", SHARDED] == pytest.approx((1 + LAYERS, whole * others))
    # Two vectors of 4 heads in each of two layers.
    assert traffic["all-reduce", SHARDED] == pytest.approx((1, 2 * 2 * 2 * 4 * 4 * others))
    assert len(traffic) == 3  # dp_shard and all data-parallel ranks are the same here


def test_collectives_of_tensor_parallel_ranks() -> None:
    traffic = trace_rank(job(Layout(tp=2)), 0).traffic
    half = MICRO * LENGTH * 64 * 4 / 2  # bytes of hidden states that come from the other rank
    token = MICRO * LENGTH * 4  # a number a token
    branches = 2 * LAYERS
    # Gathered: inputs of both branches of a layer, in the backward pass their outputs' gradients;
    # so are hidden states before the loss, the embedding's gradient, and the logits' sums.
    counted = MICRO_BATCHES * (2 * branches + 3)
    size = MICRO_BATCHES * ((2 * branches + 2) * half + token)
    assert traffic["all-gather", "tp"] == pytest.approx((counted, size))
    counted = MICRO_BATCHES * (2 * branches + 2)
    assert traffic["reduce-scatter", "tp"] == pytest.approx((counted, counted * half))
    # The target's logit; and once what both ranks hold alike: norms of layers, final norm, norms
    # of queries and keys, and of the delta rule's outputs.
    assert traffic["all-reduce", "tp"].count == MICRO_BATCHES + 1


def test_sequence_parallel_traffic_of_recurrences_does_not_grow_with_length() -> None:
    run = job(Layout(cp=2))
    run = dataclasses.replace(
        run, config=dataclasses.replace(run.config, pattern=["gated_deltanet"])
    )
    short, long = (
        trace_rank(dataclasses.replace(run, length=length), 0).traffic for length in (64, 256)
    )
    assert short["all-gather", "cp"] == long["all-gather", "cp"]


def test_pipeline_sends_activations_and_gathers_once() -> None:
    run = dataclasses.replace(job(Layout(pp=2, dp_shard=2)), global_batch=16)
    assert run.micro_batches == 4
    first, last = trace_rank(run, 0), trace_rank(run, 1)
    boundary = 4 * MICRO * LENGTH * 64 * 4
    assert first.traffic["send/receive", "pp"] == Traffic(4, boundary)  # gradients
    assert last.traffic["send/receive", "pp"] == Traffic(4, boundary)  # activations
    assert first.traffic["all-gather", SHARDED].count == 1 + LAYERS / 2


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("layout", [Layout(dp_shard=2, tp=2), Layout(cp=2)], ids=str)
def test_layers_traced_by_kind_are_the_whole(layout: Layout, mode: str) -> None:
    run = job(layout, checkpointing=mode, num_layers=5)
    by_kind, whole = trace_rank(run, 0), trace_rank(run, 0, whole=True)
    assert by_kind.traffic.keys() == whole.traffic.keys()
    for key, value in whole.traffic.items():
        assert by_kind.traffic[key] == pytest.approx(value), key
    for part in ("parameters", "gradients", "optimizer", "activations", "logits"):
        assert getattr(by_kind.memory, part) == pytest.approx(getattr(whole.memory, part)), part
    assert by_kind.memory.total == pytest.approx(whole.memory.total, rel=0.02)


def test_checkpointing_saves_activations() -> None:
    kept = [
        trace_rank(job(Layout(dp_shard=2), checkpointing=mode), 0).memory.activations
        for mode in ("none", "selective", "full")
    ]
    assert kept[0] > kept[1] > kept[2]


def test_micro_batches_in_flight() -> None:
    assert [in_flight("1f1b", 4, rank, 8) for rank in range(4)] == [4, 3, 2, 1]
    assert in_flight("1f1b", 4, 0, 2) == 2
    assert in_flight("gpipe", 4, 3, 8) == 8
    # Megatron's figure: (v - 1) p + 2 (p - rank - 1) passes of warm-up, and the one that runs.
    assert [in_flight("interleaved", 4, rank, 8) for rank in range(4)] == [11, 9, 7, 5]
    assert bubble("1f1b", 4, 12) == pytest.approx(3 / 15)
    assert bubble("interleaved", 4, 12) == pytest.approx(1.5 / 13.5)
    assert bubble("1f1b", 1, 12) == 0


def test_search_finds_layouts_that_fit() -> None:
    run = job(Layout(dp_shard=4))
    counts: list[tuple[int, int]] = []
    plans = search(
        run,
        find_hardware("H100"),
        efficiency=0.5,
        possible=lambda parallel: parallel.pp == 1 and parallel.cp == 1,
        wanted=2,
        progress=lambda done, total: counts.append((done, total)),
    )
    assert len(plans) == 2
    assert all(plan.fits and plan.job.layout.size == 4 for plan in plans)
    assert plans[0].times.step <= plans[1].times.step
    assert counts[-1] == (6, 6)


def test_a_layout_that_does_not_fit_is_said_not_to() -> None:
    small = dataclasses.replace(find_hardware("A100"), memory=1e6)
    plan = make_plan(job(Layout(dp_shard=4)), small)
    assert not plan.fits


def test_slow_network_makes_slow_steps() -> None:
    run = job(Layout(dp_shard=16))
    fast, slow = (
        make_plan(run, find_hardware("H100", network_gbs=speed)).times for speed in (1000, 0.001)
    )
    assert slow.step > fast.step


def test_unknown_hardware_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean MI300X"):
        find_hardware("MI300")


def test_page_has_everything_and_loads_nothing() -> None:
    page = plan_page(make_plan(job(Layout(dp_shard=2, tp=8)), find_hardware("H200")))
    for text in ("16 x H200", "optimiser", "reduce-scatter", "node 1", "rank 15: ", "predictions"):
        assert text in page
    outside = page.replace("http://www.w3.org/2000/svg", "")
    assert "http" not in outside and "src=" not in outside and "<script" not in outside


def test_command_writes_tables_json_and_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE)
    words = [str(recipe), "--ranks", "16", "--parallel.tp", "2", "--html", str(tmp_path / "p.html")]
    assert main([*words, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["layout"] == {
        "pp": 1,
        "dp_replicate": 1,
        "dp_shard": 8,
        "cp": 1,
        "tp": 2,
        "ranks": 16,
    }
    assert data["fits"]
    assert "<svg" in (tmp_path / "p.html").read_text()
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "GB received" in text and "predictions, not measurements" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "16", "--parallel.tp", "3"], "3 ranks do not divide|does not divide 16"),
        (["--ranks", "0"], "ranks: must be at least 1"),
        (["--ranks", "8", "--hardwear", "H100"], "did you mean --hardware"),
        (["--ranks", "8", "--efficiency", "2"], "efficiency: must be above 0"),
        (["--ranks", "8", "--data.global_batch_size", "3"], "do not divide over 8"),
    ],
)
def test_impossible_plans_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE)
    with pytest.raises(UserError, match=message):
        main([str(recipe), *words])


def test_help() -> None:
    command = [sys.executable, "-m", "rondo.launch.cli", "plan", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--network_gbs" in shown and "MI300X" in shown


def _fsdp_bytes(module: nn.Module) -> int:
    """Bytes of the float32 parameters that FSDP2 holds (all but the decays)."""
    return sum(
        4 * param.numel()
        for name, param in module.named_parameters()
        if not name.endswith(("A_log", "dt_bias"))
    )
