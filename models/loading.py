"""Reading a checkpoint without ranks: safetensors files in, whole tensors or a model out.

Files written by several ranks hold slices. Their header says under `DCP_SHARDING_INFO` at which
offsets in the whole tensor each slice begins (the convention of torch.distributed.checkpoint's
Hugging Face storage); a file without that entry holds whole tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rondo.errors import UserError
from rondo.models import manifest

if TYPE_CHECKING:
    from rondo.models.decoder import Decoder

SLICES_KEY = "DCP_SHARDING_INFO"
OFFSETS_KEY = "saved_offsets"
_MAX_CONFIG_BYTES = 1 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Slice(NamedTuple):
    """A box of a tensor, as one file holds it."""

    file: Path
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def box(self) -> tuple[slice, ...]:
        """Where it is in the tensor."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))


class Entry(NamedTuple):
    """A whole tensor, and where its parts are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    slices: list[Slice]


def load(
    checkpoint_dir: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Decoder:
    """The model of a checkpoint, on one device.

    Args:
        checkpoint_dir: a checkpoint folder (`.../checkpoints/step-000001000`).
        device: where the parameters go.
        dtype: type of the floating-point parameters; None keeps the stored one. Parameters that
            must not be cast (`Decoder.float32_names`) keep theirs.

    Raises:
        UserError: the checkpoint is damaged, or is not of the model its config.json describes.
    """
    from rondo.models.config import ModelConfig
    from rondo.models.decoder import Decoder

    folder = Path(checkpoint_dir)
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder}: no such folder")
    if problem := manifest.damage(folder):
        raise UserError(f"checkpoint {folder}: {problem}")
    try:
        config = ModelConfig(**read_json(folder / "model" / "config.json", _MAX_CONFIG_BYTES))
    except TypeError as error:
        raise UserError(f"{folder}/model/config.json: {error}") from error
    with torch.device("meta"):
        model = Decoder(config)
    wanted = model.state_dict()
    if problem := difference(tensor_index(folder / "model"), wanted, wanted.keys()):
        raise UserError(f"checkpoint {folder}: {problem}")
    tensors, kept = read_tensors(folder / "model"), model.float32_names()
    for name, value in tensors.items():
        cast = dtype if value.is_floating_point() and name not in kept else None
        tensors[name] = value.to(device=device, dtype=cast)
    model.load_state_dict(tensors, assign=True)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:  # counts, which no checkpoint has
                zero = torch.zeros_like(buffer, device=device)
                module.register_buffer(name, zero, persistent=False)
    return model


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest checkpoint of the run folder `path`.

    Raises UserError where there is none.
    """
    if (path / "manifest.json").is_file():
        return path
    found = sorted((path / "checkpoints").glob("step-*/manifest.json"))
    if not found:
        raise UserError(f"checkpoint {path}: neither a checkpoint nor a run that has one")
    return found[-1].parent


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in `folder`, whole, on the CPU.

    Raises UserError where a file is no safetensors file or slices are missing.
    """
    from safetensors import safe_open  # only files need it: models run on torch and numpy alone

    index = tensor_index(folder)
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in index.items()}
    by_file: dict[Path, list[tuple[str, Slice]]] = {}
    for name, entry in index.items():
        for part in entry.slices:
            by_file.setdefault(part.file, []).append((name, part))
    for file, parts in by_file.items():
        with safe_open(file, framework="pt") as stream:
            for name, part in parts:
                tensors[name][part.box()].copy_(stream.get_tensor(name))
    return tensors


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read, whole, when it is asked for.

    Raises UserError as `tensor_index`.
    """

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self.index = _index(folder, files)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        entry = self.index[name]
        found = torch.empty(entry.shape, dtype=entry.dtype)
        for part in entry.slices:
            with safe_open(part.file, framework="pt") as stream:
                found[part.box()].copy_(stream.get_tensor(name))
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


def tensor_index(folder: Path) -> dict[str, Entry]:
    """Type, shape and place of every tensor in the safetensors files of `folder`.

    Only headers are read, and what they claim is checked against the length of the files, so
    that whoever allocates what the index says needs no more memory than the files have bytes.

    Raises:
        UserError: a file is no safetensors file, or the slices of a tensor do not make it up.
    """
    return _index(folder, sorted(folder.glob("*.safetensors")))


def _index(folder: Path, files: Iterable[Path]) -> dict[str, Entry]:
    index: dict[str, Entry] = {}
    for file in files:
        for name, (dtype, part) in _file_index(file).items():
            entry = index.setdefault(name, Entry(dtype, (0,) * len(part.sizes), []))
            if entry.dtype != dtype or len(entry.shape) != len(part.sizes):
                raise UserError(
                    f"{file}: {name} is {dtype} with {len(part.sizes)} dimensions, "
                    f"in another file {entry.dtype} with {len(entry.shape)}"
                )
            ends = [o + s for o, s in zip(part.offsets, part.sizes, strict=True)]
            shape = tuple(max(a, b) for a, b in zip(entry.shape, ends, strict=True))
            index[name] = Entry(dtype, shape, [*entry.slices, part])
    for name, entry in index.items():
        _check_cover(folder, name, entry)
    return index


def difference(index: Mapping[str, Entry], wanted: Mapping[str, Tensor], known: Any) -> str | None:
    """How stored tensors differ from the `wanted` ones in name, shape or type.

    Args:
        index: what is stored.
        wanted: tensors to fill (only their shapes and types are looked at).
        known: names that may be stored; `wanted`'s, or more where others take the rest.

    Returns:
        One message that names up to three tensors, or None.
    """
    missing = {name: tuple(wanted[name].shape) for name in wanted if name not in index}
    found = [f"{name} {shape} is missing" for name, shape in missing.items()]
    found += [f"{n} {index[n].shape} is not expected" for n in index if n not in known]
    for name, tensor in wanted.items():
        if name in index and index[name].shape != tuple(tensor.shape):
            found.append(f"{name} is {index[name].shape}, expected {tuple(tensor.shape)}")
        elif name in index and index[name].dtype != tensor.dtype:
            found.append(f"{name} is {index[name].dtype}, expected {tensor.dtype}")
    if not found:
        return None
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return f"checkpoint of another model: {'; '.join(found[:3])}{more}"


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """A JSON object from a file of at most `max_bytes`. Raises UserError."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise UserError(f"{path} has {size} bytes, at most {max_bytes} are read")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, expected an object")
    return data


def _file_index(file: Path) -> dict[str, tuple[torch.dtype, Slice]]:
    """What one file holds; safetensors bounds the header and checks it against the length."""
    from safetensors import SafetensorError, safe_open

    result = {}
    try:
        with safe_open(file, framework="pt") as stream:
            slices = _slice_offsets(file, stream.metadata() or {})
            for name in stream.keys():  # noqa: SIM118  (a file, not a mapping)
                view = stream.get_slice(name)
                sizes, kind = tuple(view.get_shape()), view.get_dtype()
                offsets = slices.get(name, (0,) * len(sizes))
                if len(offsets) != len(sizes):
                    raise UserError(f"{file}: {name} has shape {sizes} at offsets {offsets}")
                if kind not in _DTYPES:
                    raise UserError(f"{file}: {name} has type {kind}, known are {[*_DTYPES]}")
                result[name] = (_DTYPES[kind], Slice(file, offsets, sizes))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file: {error}") from error
    return result


def _slice_offsets(file: Path, metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    try:
        info = json.loads(metadata.get(SLICES_KEY, "{}"))
        offsets = {name: tuple(entry[OFFSETS_KEY]) for name, entry in info.items()}
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{file}: cannot read {SLICES_KEY}: {error!r}") from error
    for name, value in offsets.items():
        if not all(type(v) is int and v >= 0 for v in value):
            raise UserError(f"{file}: {name} has offsets {value}, expected integers >= 0")
    return offsets


def _check_cover(folder: Path, name: str, entry: Entry) -> None:
    """Distinct slices with as many elements as the tensor: nothing is left out."""
    filled = [part for part in entry.slices if math.prod(part.sizes)]
    held, whole = sum(math.prod(part.sizes) for part in filled), math.prod(entry.shape)
    if held != whole or len({part.offsets for part in filled}) != len(filled):
        raise UserError(
            f"{folder}: the slices of {name} hold {held} elements, shape {entry.shape} has {whole}"
        )
