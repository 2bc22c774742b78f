"""DeepSpeed's configuration, from a recipe and DeepSpeed's own keys beside it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rondo.errors import UserError
from rondo.parallel.config import DeepSpeedOptions

OWN_KEYS = frozenset(
    (
        "aio",
        "comms_logger",
        "communication_data_type",
        "data_types",
        "dump_state",
        "flops_profiler",
        "gradient_predivide_factor",
        "memory_breakdown",
        "prescale_gradients",
        "steps_per_print",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    )
)
"""Keys of DeepSpeed that no recipe key stands for."""
REFUSED = {
    "optimizer": "optimizer.* decides",
    "scheduler": "schedule.* decides",
    "fp16": "precision decides",
    "bf16": "precision decides",
    "bfloat16": "precision decides",
    "amp": "precision decides",
    "torch_autocast": "precision decides",
    "activation_checkpointing": "parallel.activation_checkpointing decides",
    "checkpoint": "checkpoint.* decides",
    "tensorboard": "logging.tensorboard decides",
    "tensor_parallel": "parallel.tp goes with the native engine",
    "sequence_parallel_size": "parallel.cp goes with the native engine",
    "pipeline": "parallel.pp goes with the native engine",
    "curriculum_learning": "data.* and stages decide",
    "data_efficiency": "data.* and stages decide",
    "elasticity": "the number of ranks and data.* decide",
    "managed_gradient_accumulation": "data.micro_batch_size decides",
}
"""Keys of DeepSpeed that would do what a recipe does, with what to use."""


def deepspeed_config(
    options: DeepSpeedOptions, *, micro_batch: int, accumulation: int, ranks: int, clip_norm: float
) -> dict[str, Any]:
    """The whole configuration. Raises UserError where `own_keys` cannot be read."""
    decided = _decided(options, micro_batch, accumulation, ranks, clip_norm)
    quiet = {"steps_per_print": None, "zero_force_ds_cpu_optimizer": False}
    return _merged(_merged(quiet, own_keys(options)), decided)


def own_keys(options: DeepSpeedOptions) -> dict[str, Any]:
    """DeepSpeed's keys of the file, and on top those in the recipe. Raises UserError for a file
    that is not there or not JSON."""
    if options.config_file is None:
        return options.config
    path = Path(options.config_file)
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"parallel.deepspeed.config_file: {path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"parallel.deepspeed.config_file: {path} holds no JSON object")
    return _merged(found, options.config)


def config_problems(
    options: DeepSpeedOptions,
    *,
    micro_batch: int,
    accumulation: int | None,
    ranks: int | None,
    clip_norm: float,
) -> Iterator[str]:
    """Keys that DeepSpeed does not have, and those that say something else than the recipe.
    Without `ranks`, what depends on their number is not checked."""
    yield from _offload_problems(options)
    try:
        own = own_keys(options)
    except UserError as error:
        yield str(error)
        return
    decided = _decided(options, micro_batch, accumulation, ranks, clip_norm)
    for key, value in own.items():
        if key in REFUSED:
            yield f"parallel.deepspeed.config.{key}: {REFUSED[key]}; leave it out"
        elif key not in OWN_KEYS and key not in decided:
            near = difflib.get_close_matches(key, sorted(OWN_KEYS), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"parallel.deepspeed.config.{key}: no key of DeepSpeed that can be set here{hint}"
        elif key == "zero_optimization" and not isinstance(value, Mapping):
            yield f"parallel.deepspeed.config.{key}: expected a section, got {value!r}"
    for key, value in _leaves(own):
        wanted, source = _at(decided, key), _SOURCES.get(key, "the recipe")
        if wanted is not None and value not in (wanted, "auto"):
            yield (
                f"parallel.deepspeed.config.{key}: {value!r} contradicts {source}, "
                f"which makes it {wanted!r}; leave it out"
            )


_SOURCES = {
    "train_micro_batch_size_per_gpu": "data.micro_batch_size",
    "train_batch_size": "data.global_batch_size",
    "gradient_accumulation_steps": "data.global_batch_size over ranks and data.micro_batch_size",
    "gradient_clipping": "optimizer.clip_norm",
    "zero_optimization.stage": "parallel.deepspeed.zero_stage",
    "zero_optimization.offload_optimizer.device": "parallel.deepspeed.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "parallel.deepspeed.nvme_folder",
    "zero_optimization.offload_param.device": "parallel.deepspeed.offload_parameters",
    "zero_optimization.offload_param.nvme_path": "parallel.deepspeed.nvme_folder",
}


def _decided(
    options: DeepSpeedOptions,
    micro_batch: int,
    accumulation: int | None,
    ranks: int | None,
    clip_norm: float,
) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": options.zero_stage,
        "offload_optimizer": _place(options.offload_optimizer, options.nvme_folder),
    }
    if options.zero_stage == 3:
        zero["offload_param"] = _place(options.offload_parameters, options.nvme_folder)
    decided: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": float(clip_norm),
        "zero_optimization": zero,
    }
    if accumulation is not None and ranks is not None:
        decided["gradient_accumulation_steps"] = accumulation
        decided["train_batch_size"] = micro_batch * accumulation * ranks
    return decided


def _place(device: str, folder: str | None) -> dict[str, Any]:
    return {"device": device} | ({"nvme_path": folder} if device == "nvme" else {})


def _offload_problems(options: DeepSpeedOptions) -> Iterator[str]:
    stage, where = options.zero_stage, "parallel.deepspeed"
    if options.offload_parameters != "none" and stage != 3:
        yield (
            f"{where}.offload_parameters: {options.offload_parameters} needs zero_stage 3; with "
            f"{stage} every rank holds all parameters"
        )
    if options.offload_optimizer == "nvme" and stage != 3:
        yield f"{where}.offload_optimizer: nvme needs zero_stage 3, got {stage}; or take cpu"
    on_disk = "nvme" in (options.offload_optimizer, options.offload_parameters)
    if on_disk and options.nvme_folder is None:
        yield f"{where}.nvme_folder: needed where something is kept on nvme"
    if not on_disk and options.nvme_folder is not None:
        yield f"{where}.nvme_folder: {options.nvme_folder} is given, but nothing is kept on nvme"


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, section by section; `above` where they differ."""
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(known, Mapping)
        merged[key] = _merged(known, value) if both else value
    return merged


def _leaves(keys: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in keys.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _at(section: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for name in key.split("."):
        section = section.get(name) if isinstance(section, Mapping) else None
    return section
