"""What a model is: sizes, vocabulary, and the repeating pattern of layers."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rondo.errors import UserError
from rondo.models.registry import FFNS, MIXERS, ROUTERS, Registry

_PRESETS = Path(__file__).parent / "presets"
_OPTION_TYPES = (int, float, bool, str, type(None))
_ENTRY = re.compile(r"(?P<mixer>[\w.-]+)(\+(?P<ffn>[\w.-]+))?(\*(?P<count>[1-9]\d*))?")


@dataclass(frozen=True)
class LayerSpec:
    """One block: its sequence mixer (name in the pattern, registered name, options) and channel
    mixer."""

    name: str
    mixer: str
    options: dict[str, Any]
    ffn: str


@dataclass
class ModelConfig:
    """A decoder-only language model.

    `pattern` is repeated until there are `num_layers` layers. An entry is
    `mixer[+ffn][*count]`: "gated_deltanet*3", "attention", "mamba2+none". Names are keys of
    `rondo.models.MIXERS`, or of `mixers` where an entry gives its `kind`.
    """

    preset: str | None = None
    """Name of a bundled configuration; keys given beside it override it."""
    vocab_size: int = 0
    """Rows of the embedding; 0 takes the tokenizer's size."""
    dim: int = 256
    """Width of the residual stream."""
    num_layers: int = 8
    """Number of blocks."""
    pattern: list[str] = field(default_factory=lambda: ["gated_deltanet*3", "attention"])
    """Layers, repeated."""
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options by mixer name, for example {attention: {num_heads: 8, window: 1024}}."""
    ffn: str = "swiglu"
    """Channel mixer of entries that do not name one ("none" for no channel mixer)."""
    ffn_dim: int = 0
    """Inner width of the channel mixer; 0 means 8/3 of dim, rounded up to 64."""
    ffns: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options by channel mixer name, for example {moe: {num_experts: 64, top_k: 4}}."""
    routers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options by router name, for example {rmoe: {cell: lstm}}."""
    norm_eps: float = 1e-6
    """Offset inside RMSNorm's root."""
    zero_centered_norms: bool = False
    """RMSNorms multiply by 1 + offset, with offsets that begin at 0, as those of Qwen3-Next and
    Gemma do; norms with a gate, and those of recurrent cells, keep their weight."""
    tie_embeddings: bool = False
    """Use the embedding as output matrix."""
    logit_cap: float | None = None
    """Limit c of the output logits z: c tanh(z / c), before the loss and before sampling; null for
    logits without a limit."""
    init_std: float = 0.02
    """Standard deviation of matrices at the start; those that write to the residual stream
    are divided by the square root of the number of residual branches."""
    lora_rank: int = 0
    """Rank of low-rank adapters (LoRA, arXiv 2106.09685), which alone are trained; 0 trains all."""
    lora_alpha: float = 8.0
    """What an adapter adds is multiplied by this over its rank."""
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj"])
    """Matrices inside the blocks that get adapters, by their last name."""

    def layers(self) -> list[LayerSpec]:
        """The layers, from the first to the last. Raises UserError on an impossible entry."""
        cycle = [spec for entry in self.pattern for spec in self._expand(entry)]
        if not cycle:
            raise UserError("model.pattern: needs at least one layer, got []")
        return [cycle[i % len(cycle)] for i in range(self.num_layers)]

    def _expand(self, entry: str) -> list[LayerSpec]:
        match = _ENTRY.fullmatch(str(entry))
        if match is None:
            raise UserError(
                f"model.pattern: cannot read {entry!r}; write mixer[+ffn][*count], "
                'for example "gated_deltanet*3" or "mamba2+none"'
            )
        name, ffn = match["mixer"], match["ffn"] or self.ffn
        options = dict(self.mixers.get(name, {}))
        kind = str(options.pop("kind", name))
        if kind not in MIXERS:
            raise UserError(f"model.pattern: {MIXERS.unknown(kind)}")
        if ffn != "none" and ffn not in FFNS:
            raise UserError(f"model.pattern: {FFNS.unknown(ffn)}")
        return [LayerSpec(name, kind, options, ffn)] * int(match["count"] or 1)

    @property
    def inner_dim(self) -> int:
        """Inner width of the channel mixer."""
        return self.ffn_dim or -(-8 * self.dim // (3 * 64)) * 64

    @functools.cached_property
    def residual_std(self) -> float:
        """Standard deviation of matrices that write to the residual stream."""
        branches = sum(1 + (layer.ffn != "none") for layer in self.layers())
        return self.init_std / max(branches, 1) ** 0.5


def preset_names() -> list[str]:
    """Names of the bundled configurations."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def preset_values(name: str) -> dict[str, Any]:
    """The keys of a bundled configuration, to be given to `ModelConfig`."""
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), n=4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        which, shown = ("nearest", near) if near else ("known", preset_names())
        raise UserError(
            f"model.preset: unknown preset {name!r}{hint} ({which}: {', '.join(shown)})"
        )
    import yaml  # only presets need it: kernels and models run on torch and numpy alone

    return yaml.safe_load((_PRESETS / f"{name}.yaml").read_text())["model"]


def from_preset(name: str, **overrides: Any) -> ModelConfig:
    """A bundled configuration, with some keys changed."""
    values: dict[str, Any] = {**preset_values(name), "preset": name, **overrides}
    return ModelConfig(**values)


def make_options(mixer: str, values: Mapping[str, Any], name: str = "") -> Any:
    """A mixer's options from a mapping. Raises UserError on an unknown name, a wrong type or a
    number that is not above 0 (options are sizes and factors)."""
    return read_options(MIXERS[mixer].Options, values, f"model.mixers.{name or mixer}")


def read_options(cls: type, values: Mapping[str, Any], place: str) -> Any:
    """The options `cls` from a mapping that stands at `place`. Raises UserError as `make_options`;
    a field whose metadata says `zero` may be 0, and one that is a dataclass, or None, takes a
    mapping."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{place}.{key}"
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{where}: unknown option{hint} (known: {', '.join(fields)})")
        inner = next(filter(dataclasses.is_dataclass, typing.get_args(types[key])), None)
        if inner is None:
            _check_option(where, value, types[key], zero=fields[key].metadata.get("zero", False))
        found[key] = value if inner is None else _read_inner(inner, value, where)
    return cls(**found)


def _read_inner(cls: type, value: Any, where: str) -> Any:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        known = ", ".join(f.name for f in dataclasses.fields(cls))
        raise UserError(f"{where}: expected a mapping ({known}) or null, got {value!r}")
    return read_options(cls, value, where)


def _check_option(where: str, value: Any, want: Any, *, zero: bool) -> None:
    allowed = typing.get_args(want) or (want,)
    if unknown := [kind for kind in allowed if kind not in _OPTION_TYPES]:
        raise TypeError(f"{where}: options are of {_OPTION_TYPES}, not of {unknown[0]}")
    accepted = (*allowed, int) if float in allowed else allowed
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in allowed):
        raise UserError(f"{where}: expected {inspect.formatannotation(want)}, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if zero and not 0 <= value < math.inf:
        raise UserError(f"{where}: must be a finite number, 0 or more, got {value!r}")
    if not zero and not 0 < value < math.inf:
        raise UserError(f"{where}: must be a finite number above 0, got {value!r}")


def problems(config: ModelConfig) -> list[str]:
    """Everything that makes `config` impossible; each starts with its key. Options must be known
    and of their types wherever they are given; whether they fit the model is asked of what the
    pattern uses."""
    found = [
        f"model.{key}: must be at least {least}, got {getattr(config, key)}"
        for key, least in (
            ("vocab_size", 0),
            ("dim", 1),
            ("num_layers", 1),
            ("ffn_dim", 0),
            ("lora_rank", 0),
        )
        if getattr(config, key) < least
    ]
    found += [
        f"model.{key}: must be above 0, got {getattr(config, key)}"
        for key in ("norm_eps", "init_std", "lora_alpha")
        if not getattr(config, key) > 0
    ]
    if config.logit_cap is not None and not 0 < config.logit_cap < math.inf:
        found.append(
            f"model.logit_cap: must be a finite number above 0, or null, got {config.logit_cap}"
        )
    if config.lora_rank and not config.lora_targets:
        found.append("model.lora_targets: needs at least one name, as [q_proj], got []")
    try:
        layers = config.layers()
    except UserError as error:
        return [*found, str(error)]
    for key, registry in (("mixers", MIXERS), ("ffns", FFNS), ("routers", ROUTERS)):
        found += _option_problems(f"model.{key}", getattr(config, key), registry)
    if found:
        return found
    for spec in {repr(spec): spec for spec in layers}.values():
        options = make_options(spec.mixer, spec.options, spec.name)
        reasons = MIXERS[spec.mixer].problems(config, options)
        found += [f"model.mixers.{spec.name}.{reason}" for reason in reasons]
    for name in sorted({spec.ffn for spec in layers} - {"none"}):
        found += FFNS[name].problems(config)
    return found


def _option_problems(
    key: str, given: Mapping[str, Mapping[str, Any]], registry: Registry
) -> list[str]:
    found = []
    for name, values in given.items():
        options, kind = dict(values), name
        if registry is MIXERS:
            kind = str(options.pop("kind", name))
        try:
            if kind not in registry:
                raise UserError(f"{key}.{name}: {registry.unknown(kind)}")
            read_options(registry[kind].Options, options, f"{key}.{name}")
        except UserError as error:
            found.append(str(error))
    return found
