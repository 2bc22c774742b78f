"""What makes a layout over ranks impossible, found before any process group starts."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rondo.errors import UserError
from rondo.models import ModelConfig
from rondo.models.config import make_options
from rondo.models.registry import FFNS, MIXERS
from rondo.parallel.config import ParallelConfig
from rondo.parallel.expert import missing_torch
from rondo.parallel.mesh import Layout
from rondo.parallel.pipeline import SCHEDULES, stage_count
from rondo.pretrain.recipe import Recipe


def layout_problems(recipe: Recipe, world_size: int | None) -> Iterator[str]:
    """Sizes that are no sizes, do not make `world_size` ranks, or do not divide the batch."""
    config = recipe.parallel
    sizes = {name: getattr(config, name) for name in Layout._fields}
    wrong = [n for n, size in sizes.items() if size < 1 and (n, size) != ("dp_shard", -1)]
    for name in wrong:
        more = ", or -1 for what is left" if name == "dp_shard" else ""
        yield f"parallel.{name}: must be at least 1{more}, got {sizes[name]}"
    if wrong:
        return
    yield from _sequence(recipe)
    others = math.prod(size for name, size in sizes.items() if name != "dp_shard")
    named = " x ".join(f"{n} {s}" for n, s in sizes.items() if s != 1 and n != "dp_shard")
    shard = config.dp_shard
    if shard == -1 and world_size is not None and world_size % others:
        yield from _does_not_divide(sizes, others, named, world_size)
        return
    if shard == -1:
        shard = (world_size or others) // others
    elif world_size is not None and others * shard != world_size:
        named = " x ".join(f"{n} {s}" for n, s in sizes.items() if s != 1) or "dp_shard 1"
        yield (
            f"parallel.dp_shard: {named} = {others * shard} ranks, but the run has {world_size}; "
            "-1 takes what is left"
        )
        return
    yield from _expert_ranks(recipe, shard * config.cp)
    yield from _batch(recipe, Layout(config.pp, config.dp_replicate, shard, config.cp, config.tp))


def model_layout_problems(recipe: Recipe) -> Iterator[str]:
    """Layers, heads, channels and words that the layout cannot divide."""
    config, model = recipe.parallel, recipe.model
    if min(config.pp, config.tp) < 1:
        return
    stages = stage_count(config.pp, config.pipeline_schedule)
    if model.num_layers < stages:
        yield (
            f"parallel.pp: {config.pp} ranks make {stages} stages of a "
            f"{config.pipeline_schedule} pipeline, but the model has {model.num_layers} layers"
        )
    mode = config.activation_checkpointing
    if config.pp > 1 and config.pipeline_schedule == "zero_bubble" and mode != "none":
        yield (
            f"parallel.activation_checkpointing: {mode} recomputes a block once, but zero_bubble "
            "goes back through it twice (inputs, then weights); use none, or another "
            "parallel.pipeline_schedule such as interleaved"
        )
    if config.ep > 1:
        yield from _divided_experts(recipe)
    if config.tp > 1:
        yield from _divided(model, config)
        if recipe.compile:
            yield "compile: torch.compile does not see through the shards of parallel.tp"


def _expert_ranks(recipe: Recipe, sharded: int) -> Iterator[str]:
    """`sharded` ranks hold each parameter in parts: dp_shard x cp of them."""
    ep, dim = recipe.parallel.ep, recipe.model.dim
    if ep < 1:
        yield f"parallel.ep: must be at least 1, got {ep}"
    elif sharded % ep:
        yield (
            f"parallel.ep: {ep} ranks do not divide dp_shard x cp = {sharded}; "
            f"for example {math.gcd(sharded, ep)} would"
        )
    elif ep > 1 and dim % (sharded // ep):
        yield (
            f"parallel.ep: {ep} of {sharded} dp_shard x cp ranks leave {sharded // ep} that share "
            f"the same experts, which does not divide model.dim {dim}"
        )
    elif ep > 1 and (problem := missing_torch()):
        yield f"parallel.ep: {problem}"


def _divided_experts(recipe: Recipe) -> Iterator[str]:
    model, ep = recipe.model, recipe.parallel.ep
    ffns = {spec.ffn for spec in model.layers()} - {"none"}
    counts = {key: n for ffn in ffns for key, n in FFNS[ffn].expert_counts(model).items()}
    if not counts:
        yield f"parallel.ep: {ep} ranks have no experts to divide; model.pattern has none"
    for key, count in counts.items():
        if count % ep:
            yield (
                f"parallel.ep: {ep} ranks do not divide the {count} experts of model.{key}; "
                f"for example {math.gcd(count, ep)} would"
            )
    if recipe.compile:
        yield "compile: torch.compile does not see through the shards of parallel.ep"


def _does_not_divide(
    sizes: dict[str, int], others: int, named: str, world_size: int
) -> Iterator[str]:
    blame = next(n for n in ("tp", "cp", "pp", "dp_replicate") if sizes[n] > 1)
    if named == f"dp_replicate {others}":
        yield (
            f"parallel.dp_replicate: {others} groups do not divide {world_size} ranks; "
            f"for example {math.gcd(others, world_size)} would"
        )
        return
    yield f"parallel.{blame}: {named} = {others} does not divide {world_size} ranks"


def _batch(recipe: Recipe, layout: Layout) -> Iterator[str]:
    batch, micro = recipe.data.global_batch_size, recipe.data.micro_batch_size
    ranks = layout.data_size
    if batch < 1 or micro < 1:
        return
    named = f"dp_replicate {layout.dp_replicate} x dp_shard {layout.dp_shard}"
    share = batch // ranks
    if batch % ranks:
        yield (
            f"data.global_batch_size: {batch} sequences do not divide over {ranks} data-parallel "
            f"ranks ({named}); {-(-batch // ranks) * ranks} would"
        )
    elif share % micro:
        yield (
            f"data.micro_batch_size: {micro} does not divide a rank's share of {share} sequences "
            f"(global_batch_size {batch} over {ranks} data-parallel ranks); "
            f"for example {math.gcd(share, micro)} would"
        )
    elif layout.pp > 1:
        yield from _micro_batches(recipe, layout.pp, share // micro)


def _micro_batches(recipe: Recipe, pp: int, count: int) -> Iterator[str]:
    schedule = recipe.parallel.pipeline_schedule
    if schedule == "gpipe":
        return
    interleaved = SCHEDULES[schedule].stages_per_rank > 1
    if count < pp or (interleaved and count % max(1, count // pp)):
        wanted = f"a multiple of {pp}" if interleaved else f"at least {pp}"
        yield (
            f"parallel.pipeline_schedule: {schedule} on {pp} pipeline ranks needs {wanted} "
            f"micro-batches a step, got {count}; change data.micro_batch_size "
            f"({recipe.data.micro_batch_size}) or data.global_batch_size"
        )


def _sequence(recipe: Recipe) -> Iterator[str]:
    config, length = recipe.parallel, recipe.data.sequence_length
    parts = config.cp * config.tp
    if length >= 1 and length % parts:
        yield (
            f"data.sequence_length: {length} tokens do not divide over cp {config.cp} x tp "
            f"{config.tp} = {parts} parts; {-(-length // parts) * parts} would"
        )


def _divided(model: ModelConfig, config: ParallelConfig) -> Iterator[str]:
    tp = config.tp
    try:
        specs = {repr(spec): spec for spec in model.layers()}.values()
        for spec in specs:
            options = make_options(spec.mixer, spec.options, spec.name)
            for key, count in MIXERS[spec.mixer].heads(model, options).items():
                if count % tp:
                    yield (
                        f"parallel.tp: {tp} ranks do not divide the {count} heads of "
                        f"model.mixers.{spec.name}.{key}; for example {math.gcd(count, tp)} would"
                    )
        for ffn in {spec.ffn for spec in specs} - {"none"}:
            for key, count in FFNS[ffn].splits(model).items():
                if count % tp:
                    yield f"parallel.tp: {tp} ranks do not divide model.{key} {count}"
    except UserError:
        return  # the model's own problems are told elsewhere
    rows = -(-model.vocab_size // tp)
    if 0 < model.vocab_size <= (tp - 1) * rows:
        yield f"parallel.tp: {tp} ranks are too many for model.vocab_size {model.vocab_size}"
