"""What an engine cannot do, found before any process group starts."""

from __future__ import annotations

from collections.abc import Iterator

from rondo.errors import UserError
from rondo.models.config import problems as model_problems
from rondo.models.registry import FFNS
from rondo.parallel.config import DeepSpeedOptions, MegatronOptions
from rondo.parallel.engines.deepspeed_config import config_problems
from rondo.parallel.engines.megatron_problems import model_problems as layer_problems
from rondo.parallel.engines.megatron_problems import vocabulary_problems
from rondo.pretrain.data.tokenizer import ByteTokenizer
from rondo.pretrain.recipe import Recipe

_NOT_WITH_DEEPSPEED = {
    "pp": "DeepSpeed's pipelines need models written for them",
    "dp_replicate": "ZeRO divides over all ranks",
    "cp": "ZeRO knows no ranks that read parts of one sequence",
    "tp": "ZeRO holds each tensor whole or by its place in one long vector, DTensors are neither",
    "ep": "ZeRO divides all experts over all ranks",
}


def engine_problems(recipe: Recipe, world_size: int | None) -> Iterator[str]:
    """What the engine of `recipe` cannot do, or is not told to; `world_size` may be unknown."""
    config = recipe.parallel
    if config.engine == "deepspeed":
        yield from _deepspeed(recipe, world_size)
    elif config.deepspeed != DeepSpeedOptions():
        yield f"parallel.deepspeed: counts with parallel.engine deepspeed only, got {config.engine}"
    if config.engine == "megatron":
        yield from _megatron(recipe)
        yield from _megatron_optimizer(recipe, world_size)
    elif config.megatron != MegatronOptions():
        yield f"parallel.megatron: counts with parallel.engine megatron only, got {config.engine}"


def _megatron(recipe: Recipe) -> Iterator[str]:
    config, layers = recipe.parallel, recipe.model.layers
    if recipe.model.lora_rank:
        yield (
            "model.lora_rank: Megatron's layers compute what adapted matrices would; use "
            "parallel.engine native"
        )
    for key in ("pp", "cp", "ep"):
        if (size := getattr(config, key)) > 1:
            yield (
                f"parallel.{key}: {size} ranks, but Megatron's layers are used over tp and data "
                "ranks alone; use parallel.engine native"
            )
    if model_problems(recipe.model):
        return  # told elsewhere
    for name in sorted({spec.ffn for spec in layers()} - {"none"}):
        if FFNS[name].carried(recipe.model) or FFNS[name].losses(recipe.model):
            yield (
                f"model.pattern: {name} hands something on from layer to layer, which Megatron's "
                "layers do not know; use parallel.engine native"
            )
            return
    yield from _megatron_layers(recipe)


def check_vocabulary(recipe: Recipe, size: int) -> None:
    """Raises UserError where `size` token ids, known once the data is open, cannot be divided."""
    if recipe.parallel.engine == "megatron":
        for problem in vocabulary_problems(size, recipe.parallel.tp):
            raise UserError(problem)


def _megatron_layers(recipe: Recipe) -> Iterator[str]:
    """What its layers cannot divide over the ranks of tp."""
    if (ranks := recipe.parallel.tp) < 2:
        return
    known = {"bytes": ByteTokenizer.vocab_size}.get(recipe.data.tokenizer, 0)
    yield from vocabulary_problems(recipe.model.vocab_size or known, ranks)
    yield from layer_problems(recipe.model)


def _megatron_optimizer(recipe: Recipe, world_size: int | None) -> Iterator[str]:
    options, where = recipe.parallel.megatron, "parallel.megatron"
    if not options.distributed_optimizer:
        if options != MegatronOptions():
            yield f"{where}: overlaps and bucket_size count with distributed_optimizer true only"
        return
    if recipe.optimizer.name != "adamw":
        yield (
            f"optimizer.name: {recipe.optimizer.name} needs whole matrices, of which Megatron's "
            "data ranks hold stretches; use adamw, or parallel.engine native"
        )
    if world_size == 1:
        yield (
            f"{where}.distributed_optimizer: nothing to divide in a run of 1 rank; use false, or "
            "start more with torchrun"
        )
    if options.overlap_param_gather and recipe.compile:
        yield (
            f"compile: torch.compile does not see through the hooks of {where}."
            "overlap_param_gather; use false for one of them"
        )
    if options.bucket_size is not None and options.bucket_size < 1:
        yield f"{where}.bucket_size: must be at least 1 or null, got {options.bucket_size}"
    if options.bucket_size is not None and not options.overlap_grad_reduce:
        yield (
            f"{where}.bucket_size: {options.bucket_size} counts with overlap_grad_reduce true "
            "only; without it Megatron takes all gradients in one bucket"
        )


def _deepspeed(recipe: Recipe, world_size: int | None) -> Iterator[str]:
    config, data = recipe.parallel, recipe.data
    for key, reason in _NOT_WITH_DEEPSPEED.items():
        if (size := getattr(config, key)) > 1:
            yield f"parallel.{key}: {size} ranks, but {reason}; use parallel.engine native"
    if recipe.optimizer.name != "adamw":
        yield (
            f"optimizer.name: {recipe.optimizer.name} needs whole matrices, of which ZeRO's ranks "
            "hold pieces; use adamw, or parallel.engine native"
        )
    stage = config.deepspeed.zero_stage
    if stage == 3 and recipe.compile:
        yield "compile: torch.compile does not see through the parameters that ZeRO 3 divides"
    if stage == 3 and config.activation_checkpointing != "none":
        yield (
            f"parallel.activation_checkpointing: {config.activation_checkpointing} compares what a "
            "block keeps with what it recomputes, and ZeRO 3 gathers parameters in between; "
            "use none, another zero_stage, or parallel.engine native"
        )
    ranks, micro, batch = world_size, data.micro_batch_size, data.global_batch_size
    share = ranks * micro if ranks else 0
    accumulation = batch // share if share > 0 and batch % share == 0 else None
    yield from config_problems(
        config.deepspeed,
        micro_batch=micro,
        accumulation=accumulation,
        ranks=ranks,
        clip_norm=recipe.optimizer.clip_norm,
    )
