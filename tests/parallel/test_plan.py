"""`rondo plan`: counts by hand, schedules, layers, search and page."""

from __future__ import annotations

import dataclasses
import functools
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from rondo.errors import UserError
from rondo.models import Decoder
from rondo.parallel.mesh import Layout
from rondo.parallel.pipeline import SCHEDULES, rank_stages, stage_count
from rondo.parallel.plan.estimate import (
    Plan,
    chain_flops,
    chain_idle_share,
    link_seconds,
    make_plan,
)
from rondo.parallel.plan.hardware import find_hardware
from rondo.parallel.plan.job import Job, Model
from rondo.parallel.plan.layers import Layers, trace_layers
from rondo.parallel.plan.page import plan_page
from rondo.parallel.plan.rank import RankPlan, plan_rank, plan_ranks
from rondo.parallel.plan.recorder import Collective, Traffic
from rondo.parallel.plan.report import assumptions, show_plan
from rondo.parallel.plan.schedule import bubble, in_flight
from rondo.parallel.plan.search import least_memory, least_seconds, reshard, search
from rondo.tests.distributed.plan_cases import LENGTH, MICRO, MICRO_BATCHES, job

LAYERS = 4
H100 = find_hardware("H100")


@functools.cache
def first_rank(layout: Layout) -> RankPlan:
    return plan_ranks(job(layout))[0]


def traffic(layout: Layout, name: str, along: str, purpose: str) -> Traffic:
    return first_rank(layout).traffic[Collective(name, along, purpose)]


def test_collectives_of_sharded_parameters() -> None:
    layout = Layout(dp_shard=4)
    model = Decoder(job(layout).model.config)
    blocks = sum(_fsdp_bytes(block) for block in model.blocks.values())
    whole = _fsdp_bytes(model)
    others = 3 / 4  # of the ranks
    # Blocks are gathered for both passes, what is around them once.
    gathers = MICRO_BATCHES * (1 + 2 * LAYERS), MICRO_BATCHES * (whole + blocks) * others
    found = traffic(layout, "all-gather", "dp_shard", "parameters")
    assert found == pytest.approx(gathers)
    found = traffic(layout, "reduce-scatter", "dp_shard", "gradients")
    assert found == pytest.approx((1 + LAYERS, whole * others))
    # Two vectors of 4 heads in each of two layers.
    found = traffic(layout, "all-reduce", "dp_shard", "gradients")
    assert found == pytest.approx((1, 2 * 2 * 2 * 4 * 4 * others))
    assert len(first_rank(layout).traffic) == 3


def test_collectives_of_fast_weights() -> None:
    """Over sequence-parallel ranks: sums of every chunk, the open one too, and one of momenta."""
    chunk, layout = 16, Layout(cp=2)
    planned = job(layout, pattern=["lact"])
    planned.model.config.mixers["lact"] = {"chunk_size": chunk, "num_heads": 4}
    found = plan_ranks(planned)[0].traffic[Collective("all-reduce", "cp", "activations")]
    chunks = LENGTH // chunk + 1
    heads, width = 4, 64 // 4
    sums = 4 * MICRO * heads * (chunks * width * 3 * width + chunks)
    passes = 2 * MICRO_BATCHES * LAYERS
    assert found == pytest.approx((passes * (chunks + 1), passes * sums))


def test_collectives_of_limited_experts() -> None:
    """Sequence-parallel ranks tell each other expert and score of every choice, four bytes each."""
    planned = dataclasses.replace(job(Layout(cp=2), pattern=["attention"]), precision="bfloat16")
    key = Collective("all-gather", "cp", "activations")
    before = plan_ranks(planned)[0].traffic.get(key, Traffic(0, 0.0))
    limited = {"moe": {"num_experts": 4, "router": "linear", "capacity_factor": 0.5}}
    config = dataclasses.replace(planned.model.config, pattern=["attention+moe"], ffns=limited)
    found = plan_ranks(dataclasses.replace(planned, model=Model(config, LENGTH)))[0].traffic[key]
    sent = MICRO * LENGTH // 2 * 2 * 8
    times = MICRO_BATCHES * LAYERS
    assert (found[0] - before[0], found[1] - before[1]) == (times, times * sent)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_expert_parallel_ranks_exchange_rows_of_even_loads(precision: str) -> None:
    """Forward counts, rows, shares and results; backward the same but counts. Experts are sharded
    over the ranks that hold the same ones only."""
    count, k, dim, inner, ep, layout = 4, 2, 64, 32, 2, Layout(dp_shard=4)
    options = {"num_experts": count, "top_k": k, "expert_dim": inner, "router": "linear"}
    run = job(layout, pattern=["attention+moe"], ffns={"moe": options})
    run = dataclasses.replace(
        run, precision=precision, parallel=dataclasses.replace(run.parallel, ep=ep)
    )
    [rank] = plan_ranks(run)
    width = 2 if precision == "bfloat16" else 4
    rows = MICRO * LENGTH * k
    there = 2 * rows * dim * width + rows * 4  # shares of a router are float32
    passes = MICRO_BATCHES * LAYERS
    expected = 7 * passes, passes * (2 * there + count * 8) / ep
    assert rank.traffic[Collective("all-to-all", "expert", "activations")] == expected
    experts = LAYERS * 3 * count * inner * dim
    reduced = Collective("reduce-scatter", "expert_shard", "gradients")
    assert rank.traffic[reduced] == (LAYERS, experts / ep * 4 / 2)
    [whole] = plan_ranks(dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, ep=1)))
    assert rank.memory.parameters == whole.memory.parameters
    waiting = experts * 4 * (1 - 1 / ep)  # gradients of experts on other ranks
    assert whole.memory.gradients - rank.memory.gradients == waiting
    assert make_plan(run, H100).times.step > 0


def test_collectives_of_tensor_parallel_ranks() -> None:
    layout = Layout(tp=2)
    half = MICRO * LENGTH * 64 * 4 / 2  # bytes of hidden states that come from the other rank
    token = MICRO * LENGTH * 4  # a number a token
    branches = 2 * LAYERS
    # Gathered: inputs of both branches of a layer, in the backward pass their outputs' gradients;
    # so are hidden states before the loss, the embedding's gradient, and the logits' sums.
    counted = MICRO_BATCHES * (2 * branches + 3)
    size = MICRO_BATCHES * ((2 * branches + 2) * half + token)
    assert traffic(layout, "all-gather", "tp", "activations") == pytest.approx((counted, size))
    counted = MICRO_BATCHES * (2 * branches + 2)
    found = traffic(layout, "reduce-scatter", "tp", "activations")
    assert found == pytest.approx((counted, counted * half))
    # The target's logit; and once what both ranks hold alike: norms of layers, final norm, norms
    # of queries and keys, and of the delta rule's outputs.
    assert traffic(layout, "all-reduce", "tp", "activations").count == MICRO_BATCHES
    assert traffic(layout, "all-reduce", "tp", "gradients").count == 1


def test_groups_of_the_same_ranks_are_told_apart() -> None:
    found = first_rank(Layout(cp=2)).traffic
    assert {key.along for key in found} == {"cp"}
    assert {key.purpose for key in found} == {"parameters", "gradients", "activations"}
    found = first_rank(Layout(dp_replicate=2, dp_shard=2)).traffic
    along = {(key.name, key.along) for key in found if key.purpose == "gradients"}
    assert along == {
        ("reduce-scatter", "dp_shard"),
        ("all-reduce", "dp_replicate"),
        ("all-reduce", "dp_replicate x dp_shard"),
    }


def test_sequence_parallel_traffic_of_recurrences_does_not_grow_with_length() -> None:
    run = job(Layout(cp=2))
    config = dataclasses.replace(run.model.config, pattern=["gated_deltanet"])
    short, long = (
        plan_ranks(dataclasses.replace(run, model=Model(config, length)))[0].traffic
        for length in (64, 256)
    )
    key = Collective("all-gather", "cp", "activations")
    assert short[key] == long[key]


def test_pipeline_sends_activations_and_gathers_once() -> None:
    run = dataclasses.replace(job(Layout(pp=2, dp_shard=2)), global_batch=16)
    assert run.micro_batches == 4
    first, last = plan_ranks(run)
    boundary = Traffic(4, 4 * MICRO * LENGTH * 64 * 4)
    sent = Collective("send/receive", "pp", "activations")
    assert first.traffic[sent] == boundary  # gradients
    assert last.traffic[sent] == boundary  # activations
    gathers = Collective("all-gather", "dp_shard", "parameters")
    assert first.traffic[gathers].count == 1 + LAYERS / 2


@pytest.mark.parametrize(
    ("layout", "mode", "pattern"),
    [
        (Layout(dp_shard=2, tp=2), "selective", ["gated_deltanet", "attention"]),
        (Layout(cp=2), "none", ["hgrn2", "attention"]),  # HGRN2 shares a module over layers
        (Layout(), "full", ["gated_deltanet", "attention"]),
    ],
    ids=["tp", "cp", "one rank"],
)
def test_layers_traced_by_kind_are_the_whole(layout: Layout, mode: str, pattern: Any) -> None:
    run = job(layout, checkpointing=mode, num_layers=5, pattern=pattern)
    by_kind = plan_rank(run, 0, Layers(run).trace)
    whole = plan_rank(run, 0, lambda part: trace_layers(run, run.model.config, part))
    assert by_kind.traffic.keys() == whole.traffic.keys()
    for key, value in whole.traffic.items():
        found = by_kind.traffic[key]
        assert found.count == pytest.approx(value.count), key
        # What layers share may depend on how many there are.
        assert found.bytes == pytest.approx(value.bytes, rel=1e-3, abs=1024), key
    for part in ("parameters", "gradients", "optimizer", "activations", "logits"):
        known = getattr(whole.memory, part)
        assert getattr(by_kind.memory, part) == pytest.approx(known, rel=0.01), part
    # Shards of gradients that appear as the backward pass goes on are alive at the peak of several
    # layers, beside their own row in the table.
    total, shards = by_kind.memory.total, whole.memory.parameters
    assert 0.97 * total <= whole.memory.total <= 1.01 * total + shards


def test_checkpointing_saves_activations() -> None:
    kept = [
        plan_ranks(job(Layout(dp_shard=2), checkpointing=mode))[0].memory.activations
        for mode in ("none", "selective", "full")
    ]
    assert kept[0] > kept[1] > kept[2]


def test_gradients_wait_whole_when_there_are_several_micro_batches() -> None:
    run = job(Layout(dp_shard=4))
    once = dataclasses.replace(run, global_batch=4 * MICRO)
    assert (run.micro_batches, once.micro_batches) == (MICRO_BATCHES, 1)
    sharded = plan_ranks(once)[0].memory.gradients
    whole = _fsdp_bytes(Decoder(run.model.config))
    assert first_rank(run.layout).memory.gradients == whole
    assert sharded == pytest.approx(whole / 4, rel=0.01)


@pytest.mark.quick
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 2), (3, 5), (4, 6), (4, 12), (8, 16)])
def test_schedules_cost_what_their_tables_of_actions_do(
    schedule: str, pp: int, micro_batches: int
) -> None:
    held, idle = _replay(_actions(schedule, pp, micro_batches))
    assert [in_flight(schedule, pp, rank, micro_batches) for rank in range(pp)] == held
    assert bubble(schedule, pp, micro_batches) == pytest.approx(idle)


@pytest.mark.quick
def test_one_rank_has_no_bubble() -> None:
    assert bubble("1f1b", 1, 12) == 0 and in_flight("1f1b", 1, 0, 12) == 1


Action = tuple[str, int, int]


def _actions(schedule: str, pp: int, micro_batches: int) -> list[list[Action]]:
    """Torch's order of (action, stage, micro-batch) on each rank: F forward, B backward, I and W
    its halves for inputs and weights."""
    kind, total = SCHEDULES[schedule], stage_count(pp, schedule)
    stages = [
        SimpleNamespace(
            stage_index=i,
            num_stages=total,
            group_size=pp,
            group_rank=0,
            is_first=i == 0,
            is_last=i == total - 1,
            has_backward=True,
            submod=nn.Identity(),
        )
        for i in rank_stages(0, pp, schedule)
    ]
    table = kind.kind(stages[0] if len(stages) == 1 else stages, micro_batches).pipeline_order
    letters = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    rows = []
    for rank in range(pp):
        actions = [a for a in table[rank] if a and a.computation_type.name in letters]
        rows.append(
            [(letters[a.computation_type.name], a.stage_index, a.microbatch_index) for a in actions]
        )
    if schedule == "1f1b":  # torch's table counts the last rank's forward passes from 1
        rows[-1] = [(kind, stage, i - (kind == "F")) for kind, stage, i in rows[-1]]
    return rows


def _replay(rows: list[list[Action]]) -> tuple[list[int], float]:
    """Most forward passes that each rank holds at once, and the idle share of the whole, when
    F, I and W take a unit of time and B two. Ranks go on as soon as what they need is there."""
    last = max(stage for row in rows for _, stage, _ in row)
    ended: dict[Action, int] = {}
    clocks, held, most = [0] * len(rows), [0] * len(rows), [0] * len(rows)
    todo = [list(row) for row in rows]
    while any(todo):
        before = len(ended)
        for rank, row in enumerate(todo):
            while row and all(need in ended for need in _needs(row[0], last)):
                kind, stage, i = action = row.pop(0)
                start = max([clocks[rank], *(ended[need] for need in _needs(action, last))])
                clocks[rank] = start + (2 if kind == "B" else 1)
                ended["I" if kind == "B" else kind, stage, i] = clocks[rank]
                held[rank] += {"F": 1, "I": 0}.get(kind, -1)
                most[rank] = max(most[rank], held[rank])
        assert len(ended) > before, "the ranks wait for each other"
    work = sum(2 if kind == "B" else 1 for kind, _, _ in rows[0])
    return most, 1 - work / max(clocks)


def _needs(action: Action, last: int) -> list[Action]:
    kind, stage, i = action
    if kind == "F":
        return [("F", stage - 1, i)] if stage > 0 else []
    if kind == "W":
        return [("I", stage, i)]
    return [("F", stage, i)] + ([("I", stage + 1, i)] if stage < last else [])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_other_numbers_of_data_parallel_ranks_can_be_calculated(optimizer: str) -> None:
    few, many = (
        job(Layout(dp_shard=2), optimizer),
        job(Layout(dp_replicate=2, dp_shard=4), optimizer),
    )
    traces = Layers(few).trace
    calculated = plan_rank(many, 0, lambda part: reshard(traces(part), few, many))
    traced = plan_rank(many, 0, Layers(many).trace)
    known = {k: v for k, v in traced.traffic.items() if v.bytes > 1000 or v.count > 1}
    assert calculated.traffic.keys() == known.keys()
    for key, value in known.items():
        assert calculated.traffic[key] == pytest.approx(value, rel=0.01), key
    assert calculated.memory.total == pytest.approx(traced.memory.total, rel=0.02)


def test_search_finds_the_fastest_of_all_layouts_that_fit() -> None:
    run = dataclasses.replace(job(Layout(dp_shard=4), pattern=["attention"]), global_batch=32)
    small = dataclasses.replace(H100, memory=4.5e6)
    tried: list[Job] = []

    def possible(parallel: Any) -> bool:
        mode = parallel.activation_checkpointing
        allowed = parallel.pp * parallel.tp < 4 and parallel.cp == 1 and mode != "selective"
        if allowed:
            tried.append(dataclasses.replace(run, parallel=parallel))
        return allowed

    counts: list[tuple[int, int]] = []
    found = search(
        run,
        small,
        efficiency=0.5,
        possible=possible,
        wanted=2,
        progress=lambda done, total: counts.append((done, total)),
    )
    every = [make_plan(one, small) for one in tried]
    for plan in every:  # bounds that layouts are passed over by
        assert least_memory(plan.job) <= plan.worst.memory.total
        assert least_seconds(plan.job, small, 0.5) <= plan.times.step
    fitting = sorted(plan.times.step for plan in every if plan.fits)
    assert 0 < len(fitting) < len(every)
    assert [plan.times.step for plan in found] == pytest.approx(fitting[:2], rel=0.01)
    assert counts == sorted(counts)


@pytest.mark.quick
def test_chains_of_states_make_ranks_wait() -> None:
    """Of Titans' memory alone: the attention beside it does not wait. Two rows of one head make
    two parts, whatever the ranks; eight rows make eight."""
    for mixer in ("titans_memory", "titans_mag"):
        for layout, share in ((Layout(cp=4), 3 / 2), (Layout(cp=2, dp_shard=2), 1 / 2)):
            run = job(layout, pattern=[mixer])
            with torch.device("meta"):
                blocks: Any = Decoder(run.model.config).blocks.values()
            mixers = [block.mixer for block in blocks]
            memories = [m.memory if mixer == "titans_mag" else m for m in mixers]
            flops = 3 * sum(memory.operator_flops(LENGTH) for memory in memories)
            assert chain_flops(run) == pytest.approx(share * flops * run.tokens / 4)
            assert chain_idle_share(run) == pytest.approx(share / (1 + share))
    rows = dataclasses.replace(job(Layout(cp=4), pattern=["titans_memory"]), micro_batch=8)
    assert chain_idle_share(rows) == pytest.approx(3 / 11)
    text = io.StringIO()
    show_plan(make_plan(rows, H100), Console(file=text, width=150))
    assert "a rank waits 27.3% of their time" in text.getvalue()
    assert chain_flops(job(Layout(dp_shard=4), pattern=["titans_memory"])) == 0
    assert chain_flops(job(Layout(cp=4))) == 0


@pytest.mark.quick
def test_experts_that_no_grouped_product_takes_are_named() -> None:
    options = {"num_experts": 4, "top_k": 2, "expert_dim": 24, "router": "linear"}

    def notes(tp: int) -> list[str]:
        run = job(Layout(tp=tp), pattern=["attention+moe"], ffns={"moe": options})
        return [text for text in assumptions(make_plan(run, H100)) if "grouped product" in text]

    assert notes(1) == []
    assert ["experts of 12 channels a rank (tp 2)" in text for text in notes(2)] == [True]


@pytest.mark.quick
def test_links() -> None:
    data = Traffic(0, 450e9)
    layout = Layout(dp_replicate=4, dp_shard=4, tp=2)  # a node holds one dp_shard x tp
    assert link_seconds(data, layout, "dp_shard", H100) == pytest.approx(1)
    # Across nodes each rank has its own adapter; four of a group in a node go out by four.
    assert link_seconds(data, layout, "dp_replicate", H100) == pytest.approx(9)
    wide = Layout(dp_shard=16, tp=2)
    assert link_seconds(data, wide, "dp_shard", H100) == pytest.approx(9 / 4)
    assert link_seconds(Traffic(3, 0), layout, "tp", H100) == pytest.approx(3 * H100.node_latency)
    # Groups of six do not fill nodes of eight evenly: some go out.
    slow = link_seconds(data, Layout(dp_shard=2, tp=6), "tp", H100)
    assert slow == pytest.approx(450 / 300)
    # Four neighbours in dp_shard hold all experts, in a node; ranks with the same ones are apart.
    assert link_seconds(data, wide, "expert", H100, ep=4) == pytest.approx(1)
    assert link_seconds(data, wide, "expert_shard", H100, ep=4) == pytest.approx(9)


def test_what_does_not_fit_is_said_not_to_and_slow_networks_cost() -> None:
    run = job(Layout(dp_shard=16))
    plan = make_plan(run, H100)
    assert plan.fits and not dataclasses.replace(plan, hardware=_with(memory=1e6)).fits
    slow = Plan(run, find_hardware("H100", network_gbs=0.001), 0.5, plan.ranks)
    assert slow.times.step > plan.times.step
    assert plan.mfu == pytest.approx(
        plan.model_flops / (16 * plan.times.step * plan.hardware.peak_flops)
    )


@pytest.mark.quick
def test_hardware() -> None:
    with pytest.raises(UserError, match="did you mean MI300X"):
        find_hardware("MI300")
    with pytest.raises(UserError, match="node_size: must be above 0 and below 1e9, got 0"):
        find_hardware("H100", node_size=0)
    mine = find_hardware("h200", node_size=4, nvlink_gbs=300, network_gbs=25)
    assert (mine.node_size, mine.node_bandwidth, mine.network_bandwidth) == (4, 300e9, 25e9)


def test_page_has_everything_and_loads_nothing() -> None:
    page = plan_page(make_plan(job(Layout(dp_shard=2, tp=8), ffn_dim=128, heads=8), H100))
    for text in ("16 x H100", "optimiser", "reduce-scatter", "node 1", "rank 15: ", "predictions"):
        assert text in page
    outside = page.replace("http://www.w3.org/2000/svg", "")
    assert "http" not in outside and "src=" not in outside and "<script" not in outside


def _with(**figures: Any) -> Any:
    return dataclasses.replace(H100, **figures)


def _fsdp_bytes(module: nn.Module) -> int:
    """Bytes of the float32 parameters that FSDP2 holds (all but the decays)."""
    return sum(
        4 * param.numel()
        for name, param in module.named_parameters()
        if not name.endswith(("A_log", "dt_bias"))
    )
