"""`rondo export` and `rondo import`: checkpoints and Hugging Face folders."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from rondo.errors import UserError
from rondo.models import Decoder, ModelConfig, hf, manifest
from rondo.models.hf.linearize import linearize, shortest
from rondo.models.loading import difference, find_checkpoint, load, tensor_index
from rondo.parallel.checkpoint import STATE
from rondo.pretrain.data import Tokenizer, load_tokenizer
from rondo.pretrain.data.tokenizer_json import json_vocabulary, to_json
from rondo.pretrain.imported import read_source, write_source
from rondo.pretrain.plain import write_yaml

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 1 << 30
"""Of a file that `rondo import` writes."""
_RECIPE = "recipe.yaml"
_NO_SOURCE = {"max_position_embeddings": 8192, "bos_token_id": None, "pad_token_id": None}
"""In config.json of a model that was not imported."""


@dataclass
class ExportConfig:
    """What `rondo export` writes."""

    checkpoint: str
    """A checkpoint folder, or a run folder (its newest checkpoint)."""
    output: str
    """Folder for the model; must be empty or not there."""
    format: Literal["hf"] = "hf"
    """hf: a Hugging Face folder, with config.json, safetensors and the tokenizer."""
    architecture: str = "auto"
    """LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM,
    Mamba2ForCausalLM, Qwen3NextForCausalLM, or RondoForCausalLM, which takes any model; auto: the
    first that fits."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the tensors."""
    max_positions: int | None = None
    """The longest sequence that config.json tells libraries of; None: as the folder said that the
    checkpoint was imported from, else 8192."""


@dataclass
class ImportConfig:
    """What `rondo import` reads."""

    folder: str
    """A Hugging Face folder: config.json, safetensors and tokenizer.json."""
    output: str
    """Folder for the checkpoint, which `checkpoint.init_from` takes; must not be there."""
    tokenizer: str | None = None
    """Tokenizer of the model, where the folder has none: bytes, a .model or a tokenizer.json."""
    linearize: list[str] = field(default_factory=list)
    """How to read attention layers: as gated linear attention (liger) or as they are (attention),
    repeated over depth, as [liger*7, attention] (arXiv 2503.01496). [] leaves all as they are."""


def export_checkpoint(config: ExportConfig) -> Path:
    """Writes a checkpoint's model in another format. Raises UserError."""
    folder, output = find_checkpoint(Path(config.checkpoint)), Path(config.output)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"output: {output} is not empty")
    model, source = load(folder), read_source(folder)
    longest = config.max_positions
    given = {} if longest is None else {"max_position_embeddings": longest}
    tokenizer = load_tokenizer(folder / "tokenizer")
    tensors = {name: param.detach() for name, param in model.named_parameters()}
    tensors |= {k: v for k, v in model.state_dict().items() if k not in tensors}
    name = hf.write_folder(
        output,
        model.config,
        tensors,
        architecture=config.architecture,
        dtype=DTYPES[config.dtype],
        **{**_NO_SOURCE, "eos_token_id": tokenizer.eod, **source["config"], **given},
    )
    read_by = _write_tokenizer(tokenizer, output, source["tokens"])
    print(f"{folder} -> {output}: {name}, {config.dtype}; tokenizer: {read_by}")
    if name == hf.RONDO:
        print("transformers loads it after `import rondo.models.hf.modeling`")
    return output


def import_folder(config: ImportConfig) -> Path:
    """Writes a Hugging Face model as a checkpoint. Raises UserError."""
    folder, output = Path(config.folder), Path(config.output)
    if output.exists():
        raise UserError(f"output: {output} is there already")
    model, tensors = hf.open_folder(folder)
    if config.linearize:
        model = linearize(model, config.linearize)
    with torch.device("meta"):
        wanted = Decoder(model).state_dict()
    whole = ((k, v.float() if v.is_floating_point() else v) for k, v in tensors)
    seen = track(whole, "tensors", total=len(wanted), console=Console(stderr=True))
    tokenizer = _find_tokenizer(folder, config.tokenizer)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"tokenizer: {tokenizer.vocab_size} tokens, and the embedding has {model.vocab_size}"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as parent:
        written = Path(parent) / output.name
        _write_checkpoint(written, output, model, seen, tokenizer)
        write_source(written, folder, other_tokenizer=config.tokenizer is not None)
        _write_manifest(written)
        problem = difference(tensor_index(written / "model"), wanted, wanted.keys())
        if problem:
            raise UserError(f"{folder}: {problem}")
        written.rename(output)
    print(
        f"{folder} -> {output}: {model.num_layers} layers; rondo train {output / _RECIPE} goes on "
        "from it, with --data.sources of yours"
    )
    return output


def _write_checkpoint(
    folder: Path,
    output: Path,
    model: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Tokenizer,
) -> None:
    """Writes a checkpoint into `folder`, but for its manifest, and the recipe that begins with it
    when it is `output`."""
    for part in ("model", "tokenizer"):
        (folder / part).mkdir(parents=True)
    _write_shards(folder / "model", tensors)
    text = json.dumps(dataclasses.asdict(model), indent=1)
    (folder / "model" / "config.json").write_text(text)
    tokenizer.save(folder / "tokenizer")
    recipe = {
        "name": f"{output.name}-continued",
        "model": _given(dataclasses.replace(model, pattern=shortest(model.pattern))),
        "data": {"tokenizer": str(output / "tokenizer")},
        "checkpoint": {"init_from": str(output)},
    }
    (folder / _RECIPE).write_text(write_yaml(recipe))
    (folder / STATE).write_text(json.dumps({"step": 0, "data": None}))  # of no run


def _write_manifest(folder: Path) -> None:
    names = [path for path in folder.rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): manifest.record(path) for path in names}
    manifest.write(folder, 0, files)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes tensors as they come, in files of at most `SHARD_BYTES`, or of one tensor: those of
    one file, and the next, are all that is held."""
    shard: dict[str, Tensor] = {}
    files = 0
    for name, value in tensors:
        if shard and sum(x.nbytes for x in shard.values()) + value.nbytes > SHARD_BYTES:
            files += 1
            save_file(shard, folder / f"model-{files:05d}.safetensors")
            shard.clear()
        shard[name] = value
    save_file(shard, folder / f"model-{files + 1:05d}.safetensors")


def _given(model: ModelConfig) -> dict[str, Any]:
    """The keys of a model that are not at their defaults."""
    plain, defaults = dataclasses.asdict(model), dataclasses.asdict(ModelConfig())
    return {key: value for key, value in plain.items() if value != defaults[key]}


def _find_tokenizer(folder: Path, given: str | None) -> Tokenizer:
    if given is not None:
        return load_tokenizer(given)
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return load_tokenizer(folder / name)
    raise UserError(
        f"{folder}: no tokenizer.json or tokenizer.model; name the model's with --tokenizer"
    )


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, tokens: Mapping[str, str]) -> str:
    """Writes it so that transformers reads it, if it can, with the special `tokens` that it has;
    says what it did."""
    found = to_json(tokenizer)
    if found is None:
        tokenizer.save(folder)
        return (
            f"{tokenizer.file_name}, which is to be read with sentencepiece: with a tokenizer.json "
            "it would give other ids"
        )
    content, end = found
    (folder / "tokenizer.json").write_text(content)
    known = json_vocabulary(content)
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    values |= {name: text for name, text in tokens.items() if text in known}
    # A document cannot smuggle in its own end, nor does decoding touch its spaces.
    values |= {"split_special_tokens": True, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n")
    return "tokenizer.json"
