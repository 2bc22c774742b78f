"""A plan as text and as plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from rondo.kernels.expert_products import ALIGNED_WIDTH
from rondo.parallel.plan.estimate import MEMORY_SHARE, Plan, chain_idle_share

GIB = 2**30
PARTS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "activations": "activations",
    "logits": "logits and loss",
    "communication": "communication buffers",
    "workspace": "other working memory",
}
SEARCH_HEADS = ("layout", "GiB", "s a step", "bubble", "MFU", "tokens/s")
PURPOSES = {"optimizer": "optimiser"}


def plan_data(plan: Plan) -> dict[str, Any]:
    """Plain data: bytes, seconds, FLOPs."""
    return {
        "layout": {**plan.job.layout._asdict(), "ranks": plan.job.ranks},
        "ep": plan.job.parallel.ep,
        "activation_checkpointing": plan.job.parallel.activation_checkpointing,
        "pipeline_schedule": plan.job.parallel.pipeline_schedule,
        "micro_batches": plan.job.micro_batches,
        "parameters": plan.job.model.parameters,
        "state_bytes": plan.job.model.state_bytes,
        "hardware": dataclasses.asdict(plan.hardware),
        "memory_by_pipeline_rank": [
            {"pp_rank": r.pp_rank, **dataclasses.asdict(r.memory), "total": r.memory.total}
            for r in plan.ranks
        ],
        "fits": plan.fits,
        "collectives": [
            {"pp_rank": r.pp_rank, **key._asdict(), **traffic._asdict()}
            for r in plan.ranks
            for key, traffic in sorted(r.traffic.items())
        ],
        "model_flops": plan.model_flops,
        "predicted": {
            **dataclasses.asdict(plan.times),
            "step": plan.times.step,
            "bubble_share": plan.bubble_share,
            "mfu": plan.mfu,
            "tokens_per_second": plan.tokens_per_second,
        },
        "assumptions": assumptions(plan),
    }


def assumptions(plan: Plan) -> list[str]:
    """What a prediction rests on."""
    return [
        f"a GPU computes at {plan.efficiency:.0%} of its {plan.hardware.peak_flops / 1e12:.0f} "
        "TFLOP/s (dense bfloat16), which MFU cannot exceed: assumed, not measured; --efficiency",
        "FSDP2's traffic (parameters, gradients) overlaps computation and costs what is longer; "
        "all other traffic is added",
        "a group inside a node uses its links, any other as many network adapters as it has ranks "
        "in a node; at full bandwidth, and log2 of its size latencies for each collective",
        f"a layout fits when it fills at most {MEMORY_SHARE:.0%} of a GPU's memory; activations "
        "are those of the PyTorch kernels, without torch.compile",
        *(["every expert gets as many tokens as any other"] if plan.job.parallel.ep > 1 else []),
        *_looped_experts(plan),
    ]


def _looped_experts(plan: Plan) -> list[str]:
    """Says which experts a GPU's grouped product does not take, as a rank of tp has them."""
    ranks = plan.job.layout.tp
    widths = sorted(width // ranks for width in plan.job.model.expert_widths)
    return [
        f"experts of {width} channels a rank (tp {ranks}) run one after another and slower than "
        f"predicted: a GPU's grouped product takes multiples of {ALIGNED_WIDTH}"
        for width in widths
        if width % ALIGNED_WIDTH
    ]


def layout_text(plan: Plan) -> str:
    """The dimensions of a layout that are not 1, and what is recomputed."""
    sizes = [f"{n} {s}" for n, s in plan.job.layout._asdict().items() if s > 1] or ["one rank"]
    mode = plan.job.parallel.activation_checkpointing
    ep = plan.job.parallel.ep
    experts = f", experts over {ep}" if ep > 1 else ""
    return " x ".join(sizes) + experts + (f", {mode} checkpointing" if mode != "none" else "")


def summary_rows(plan: Plan) -> list[tuple[str, str]]:
    """The most important of a plan, by name."""
    job, hardware, times = plan.job, plan.hardware, plan.times
    model = job.model
    room = hardware.memory / GIB
    return [
        ("model", f"{_count(model.parameters)} parameters, {model.config.num_layers} layers"),
        (
            "state",
            f"{model.state_bytes / 2**20:,.1f} MiB for a sequence of {model.length} tokens "
            "(recurrent states, memories, key/value caches)",
        ),
        (
            "hardware",
            f"{job.ranks} x {hardware.name} ({room:.1f} GiB), nodes of {hardware.node_size}, "
            f"{hardware.node_bandwidth / 1e9:.0f} GB/s inside, "
            f"{hardware.network_bandwidth / 1e9:.0f} GB/s between",
        ),
        ("layout", layout_text(plan)),
        (
            "step",
            f"{job.global_batch} sequences of {model.length} tokens; {job.micro_batches} "
            f"micro-batch(es) of {job.micro_batch} a rank, {job.precision}",
        ),
        (
            "memory",
            f"{plan.worst.memory.total / GIB:.2f} GiB on the fullest rank: "
            + ("fits" if plan.fits else "DOES NOT FIT"),
        ),
        ("FLOPs", f"{plan.model_flops:.3e} a step (model, without recomputation)"),
        (
            "predicted",
            f"{times.step:.4g} s a step, MFU {plan.mfu:.1%}, "
            f"{plan.tokens_per_second:,.0f} tokens/s",
        ),
        ("time", ", ".join(f"{name} {value:.3g} s" for name, value in time_parts(plan))),
        ("bubble", f"{plan.bubble_share:.1%} of the step"),
        *_chains(plan),
    ]


def _chains(plan: Plan) -> list[tuple[str, str]]:
    idle = chain_idle_share(plan.job)
    return [("chains of states", f"a rank waits {idle:.1%} of their time")] if idle else []


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e8 else f"{number / 1e6:.2f}M"


def time_parts(plan: Plan) -> list[tuple[str, float]]:
    """What the predicted step consists of, in seconds."""
    times = plan.times
    return [
        ("computation", times.compute),
        ("traffic that waits", times.waiting),
        ("FSDP2 traffic not hidden", times.exposed),
        ("chains of states", times.chains),
        ("bubble", times.bubble),
        ("optimiser", times.optimizer),
    ]


def show_plan(plan: Plan, console: Console) -> None:
    """Prints a plan."""
    console.print(Group(_summary(plan), _memory(plan), _collectives(plan), _assumptions(plan)))


def show_search(plans: list[Plan], console: Console) -> None:
    """Prints the best layouts, best first."""
    table = Table(title="best layouts that fit (predicted)", title_justify="left")
    for name in ("", *SEARCH_HEADS):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for i, plan in enumerate(plans, 1):
        table.add_row(str(i), *search_row(plan))
    console.print(table)


def search_row(plan: Plan) -> tuple[str, ...]:
    """A plan beside others, under `SEARCH_HEADS`."""
    return (
        layout_text(plan),
        f"{plan.worst.memory.total / GIB:.1f}",
        f"{plan.times.step:.4g}",
        f"{plan.bubble_share:.1%}",
        f"{plan.mfu:.1%}",
        f"{plan.tokens_per_second:,.0f}",
    )


def _summary(plan: Plan) -> Table:
    table = Table(show_header=False, box=None, title="plan", title_justify="left")
    for key, value in summary_rows(plan):
        table.add_row(key, value)
    return table


def _memory(plan: Plan) -> Table:
    table = Table(title="memory of a rank, GiB", title_justify="left")
    table.add_column("part")
    for rank in plan.shown:
        table.add_column(f"pp rank {rank.pp_rank}", justify="right")
    for key, name in PARTS.items():
        table.add_row(name, *(f"{getattr(r.memory, key) / GIB:.3f}" for r in plan.shown))
    table.add_section()
    table.add_row("total", *(f"{r.memory.total / GIB:.3f}" for r in plan.shown))
    return table


def collective_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Collective, dimensions, purpose, and count and GB a step for each rank of the plan."""
    rows = []
    for key in sorted({key for rank in plan.shown for key in rank.traffic}):
        cells = [key.name, key.along, PURPOSES.get(key.purpose, key.purpose)]
        for rank in plan.shown:
            traffic = rank.traffic.get(key)
            cells += [f"{traffic.count:.0f}", gigabytes(traffic.bytes)] if traffic else ["", ""]
        rows.append(tuple(cells))
    return rows


def gigabytes(size: float) -> str:
    """Bytes as GB, small ones to more places."""
    return f"{size / 1e9:.3f}" if size >= 1e6 else f"{size / 1e9:.1e}"


def _collectives(plan: Plan) -> Table:
    table = Table(title="collectives of a rank in a step", title_justify="left")
    table.add_column("collective")
    table.add_column("along")
    table.add_column("for")
    for rank in plan.shown:
        table.add_column(f"count, pp rank {rank.pp_rank}", justify="right")
        table.add_column("GB received", justify="right")
    for row in collective_rows(plan):
        table.add_row(*row)
    return table


def _assumptions(plan: Plan) -> Text:
    lines = ["Times are predictions, not measurements. They assume:"]
    return Text("\n  - ".join([*lines, *assumptions(plan)]))
