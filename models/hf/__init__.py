"""Models as Hugging Face folders, and back.

A folder has config.json and safetensors files. Architectures that transformers knows are written
in its own names (`ARCHITECTURES`); any other model as `RondoForCausalLM` (`models/hf/modeling.py`),
which transformers loads once `rondo.models.hf.modeling` is imported. Tensors are copied and
reordered; where theirs are norms that multiply by 1 + weight and ours are not, moved by one, in
float64 so that nothing is rounded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rondo.errors import UserError
from rondo.models import manifest
from rondo.models.config import ModelConfig
from rondo.models.decoder import Decoder
from rondo.models.hf.bonds import Bond, to_ours, to_theirs
from rondo.models.hf.llama import Llama, Mistral, Qwen2, Qwen3
from rondo.models.hf.mamba2 import Mamba2Architecture
from rondo.models.hf.qwen3_next import Qwen3Next
from rondo.models.loading import StoredTensors, read_json
from rondo.models.lora import merged

__all__ = [
    "ARCHITECTURES",
    "RONDO",
    "choose",
    "open_folder",
    "read_folder",
    "weight_files",
    "write_folder",
]

RONDO = "RondoForCausalLM"
PREFIX = "decoder."
"""Before our names in a `RondoForCausalLM`."""
_MAX_CONFIG_BYTES = 1 << 20
_MAX_INDEX_BYTES = 64 << 20
_MAX_SHARD = "5GB"


class Architecture(Protocol):
    """One that transformers knows."""

    name: str
    model_type: str

    def unlike(self, config: ModelConfig) -> str | None: ...
    def write(self, config: ModelConfig) -> dict[str, Any]: ...
    def read(self, values: Mapping[str, Any]) -> dict[str, Any]: ...
    def bonds(self, config: ModelConfig) -> list[Bond]: ...


ARCHITECTURES: dict[str, Architecture] = {
    one.name: one
    for one in (Llama(), Mistral(), Qwen2(), Qwen3(), Mamba2Architecture(), Qwen3Next())
}


def choose(config: ModelConfig, name: str = "auto") -> str:
    """The architecture to write a model as. Raises UserError where it is not of the one named."""
    if name == RONDO:
        return RONDO
    reasons = {one.name: _unlike(one, config) for one in ARCHITECTURES.values()}
    if name == "auto":
        return next((found for found, reason in reasons.items() if reason is None), RONDO)
    if name not in reasons:
        known = ", ".join(["auto", *reasons, RONDO])
        raise UserError(f"architecture: unknown {name!r} (known: {known})")
    if reasons[name] is not None:
        raise UserError(f"architecture: {reasons[name]}; {RONDO} takes any model")
    return name


def _unlike(one: Architecture, config: ModelConfig) -> str | None:
    if config.logit_cap is not None:
        return f"{one.name} has no cap on logits: it needs logit_cap null, not {config.logit_cap}"
    return one.unlike(config)


def write_folder(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    architecture: str = "auto",
    dtype: torch.dtype = torch.float32,
    **values: Any,
) -> str:
    """Writes a model.

    Args:
        folder: where config.json and safetensors files go; made if it is not there.
        config: the model.
        tensors: its parameters, whole, by name; adapters are merged into their matrices.
        architecture: one of `ARCHITECTURES`, "RondoForCausalLM", or "auto": the first that fits.
        dtype: type of the floating-point tensors that may be cast. With float32, those that are
            exact in float64 alone have that.
        values: further keys of config.json, such as eos_token_id.

    Returns:
        The architecture.

    Raises:
        UserError: the model is not of the architecture.
    """
    from huggingface_hub import save_torch_state_dict

    if config.lora_rank:
        config, tensors = merged(config, tensors)
    name = choose(config, architecture)
    with torch.device("meta"):
        whole = Decoder(config).float32_names()
    if name == RONDO:
        theirs = {f"{PREFIX}{key}": value for key, value in tensors.items()}
        described: dict[str, Any] = rondo_values(config)
        kept = {f"{PREFIX}{key}" for key in whole}
    else:
        one = ARCHITECTURES[name]
        bonds = one.bonds(config)
        theirs = to_theirs(bonds, {k: v.float() for k, v in tensors.items()})
        described = {"model_type": one.model_type, **one.write(config)}
        kept = {bond.theirs for bond in bonds if whole.issuperset(bond.ours)}
        if dtype == torch.float32:
            kept |= {key for key, value in theirs.items() if value.dtype == torch.float64}
    for key, value in theirs.items():
        if value.is_floating_point() and key not in kept:
            theirs[key] = value.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    described |= {"architectures": [name], "dtype": str(dtype).removeprefix("torch."), **values}
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    save_torch_state_dict(theirs, folder, max_shard_size=_MAX_SHARD)
    return name


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model of a folder and all its tensors by our names. Raises as `open_folder`."""
    config, tensors = open_folder(folder)
    return config, dict(tensors)


def open_folder(folder: Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """The model of a folder and its tensors by our names, float32 unless they are ours already;
    each is read when its turn comes.

    Raises UserError where the architecture is unknown, or something of it has no counterpart.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; expected a Hugging Face model folder")
    values = read_json(path, _MAX_CONFIG_BYTES)
    name = (values.get("architectures") or [None])[0]
    theirs = StoredTensors(folder, weight_files(folder))
    if not theirs:
        raise UserError(f"{folder}: no safetensors files")
    if name == RONDO:
        ours = ((key.removeprefix(PREFIX), value) for key, value in theirs.items())
        return ModelConfig(**values["rondo"]), ours
    if name not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, RONDO])
        raise UserError(f"{path}: architecture {name!r} is unknown (known: {known})")
    one = ARCHITECTURES[name]
    try:
        config = ModelConfig(**one.read(values))
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from None
    if config.tie_embeddings:
        theirs.index.pop("lm_head.weight", None)
    try:
        return config, to_ours(one.bonds(config), theirs)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads: those that `model.safetensors.index.json`
    names, else `model.safetensors`, else all there are. Raises UserError where the index is none.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        named = read_json(index, _MAX_INDEX_BYTES).get("weight_map")
        names = {*named.values()} if isinstance(named, dict) else {None}
        if wrong := [
            name for name in names if not (isinstance(name, str) and manifest.valid_name(name))
        ]:
            raise UserError(f"{index}: weight_map: expected names of files, got {wrong[0]!r}")
        return [folder / name for name in sorted(names)]
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def rondo_values(config: ModelConfig) -> dict[str, Any]:
    """What the config.json of a `RondoForCausalLM` says."""
    return {
        "model_type": "rondo",
        "rondo": dataclasses.asdict(config),
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "tie_word_embeddings": False,  # a matrix that serves twice is one parameter here
    }
