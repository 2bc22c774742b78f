"""Llama, Mistral, Qwen2 and Qwen3: attention in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rondo.errors import UserError
from rondo.models.config import LayerSpec, ModelConfig, make_options
from rondo.models.hf.bonds import Bond, same
from rondo.models.hf.common import (
    attention_values,
    matrices,
    read_rope,
    refuse,
    sizes,
    swiglu_bonds,
)

FULL, SLIDING = "full_attention", "sliding_attention"
DEFAULT_WINDOW = 4096
"""Of transformers, where config.json has no `sliding_window`."""
NORMS = {"mixer_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


class Llama:
    """`LlamaForCausalLM` (arXiv 2307.09288): without norms of queries and keys, or windows."""

    name, model_type = "LlamaForCausalLM", "llama"
    attention: ClassVar = {"qk_norm": False, "qkv_bias": False}
    """Options of ours that it always has."""

    def unlike(self, config: ModelConfig) -> str | None:
        """Why a model of ours is none of these; None if it is one."""
        if config.zero_centered_norms:
            return f"{self.name} needs zero_centered_norms False, not True"
        specs = config.layers()
        for spec in specs:
            if problem := _unlike_layer(spec, self.attention):
                return f"{self.name} {problem}"
        every = [_options(spec) for spec in specs]
        first = every[0]
        if any({**o, "window": None} != {**first, "window": None} for o in every):
            return f"{self.name} has the same attention in every layer, but for windows"
        problem = self.unlike_windows([o["window"] for o in every])
        return problem and f"{self.name} {problem}"

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """What their config.json says of it."""
        specs = config.layers()
        values = {**sizes(config), **attention_values(config, specs[0])}
        return values | self.window_values([_options(spec)["window"] for spec in specs])

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of our configuration, from their config.json. Raises UserError."""
        refuse(values, attention_bias=False, mlp_bias=False, hidden_act="silu")
        heads = int(values["num_attention_heads"])
        options = {
            "num_heads": heads,
            "num_kv_heads": int(values.get("num_key_value_heads") or heads),
            "head_dim": int(values.get("head_dim") or values["hidden_size"] // heads),
            **read_rope(values),
            **self.attention,
        }
        kinds = self.layer_types(values)
        mixers: dict[str, dict[str, Any]] = {"attention": options}
        if SLIDING in kinds:
            mixers["window"] = {
                "kind": "attention",
                **options,
                "window": int(values.get("sliding_window", DEFAULT_WINDOW)),
            }
        names = {FULL: "attention", SLIDING: "window"}
        return {
            "vocab_size": int(values["vocab_size"]),
            "dim": int(values["hidden_size"]),
            "num_layers": int(values["num_hidden_layers"]),
            "ffn_dim": int(values["intermediate_size"]),
            "norm_eps": float(values.get("rms_norm_eps", 1e-6)),
            "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
            "pattern": [names[kind] for kind in kinds],
            "mixers": mixers,
        }

    def unlike_windows(self, windows: list[int | None]) -> str | None:
        """Why windows, one a layer, are none of theirs; None if they are."""
        return None if {*windows} == {None} else "has no windows"

    def window_values(self, windows: list[int | None]) -> dict[str, Any]:
        """What their config.json says of windows."""
        return {}

    def layer_types(self, values: Mapping[str, Any]) -> list[str]:
        """The kind of attention of each layer, from their config.json. Raises UserError."""
        return [FULL] * int(values["num_hidden_layers"])

    def bonds(self, config: ModelConfig) -> list[Bond]:
        """All tensors."""
        found = matrices(config, "model.embed_tokens")
        found.append(same("model.norm.weight", "norm.weight"))
        for i in range(config.num_layers):
            ours, theirs = f"blocks.{i}", f"model.layers.{i}"
            found += [same(f"{theirs}.{b}.weight", f"{ours}.{a}.weight") for a, b in NORMS.items()]
            found += attention_bonds(ours, theirs, **self.attention)
            found += swiglu_bonds(ours, theirs)
        return found


class Mistral(Llama):
    """`MistralForCausalLM` (arXiv 2310.06825): Llama with the same window in every layer."""

    name, model_type = "MistralForCausalLM", "mistral"

    def unlike_windows(self, windows: list[int | None]) -> str | None:
        return None if len({*windows}) == 1 else "has the same window in every layer"

    def window_values(self, windows: list[int | None]) -> dict[str, Any]:
        return {"sliding_window": windows[0]}

    def layer_types(self, values: Mapping[str, Any]) -> list[str]:
        kind = FULL if values.get("sliding_window", DEFAULT_WINDOW) is None else SLIDING
        return [kind] * int(values["num_hidden_layers"])


class Qwen3(Llama):
    """`Qwen3ForCausalLM`: queries and keys are normalised per head; windows in some layers."""

    name, model_type = "Qwen3ForCausalLM", "qwen3"
    attention: ClassVar = {"qk_norm": True, "qkv_bias": False}

    def unlike_windows(self, windows: list[int | None]) -> str | None:
        sizes = sorted({w for w in windows if w is not None})
        return None if len(sizes) < 2 else f"has one size of window, not {sizes}"

    def window_values(self, windows: list[int | None]) -> dict[str, Any]:
        window = next((w for w in windows if w is not None), None)
        return {
            "layer_types": [FULL if w is None else SLIDING for w in windows],
            "use_sliding_window": window is not None,
            "sliding_window": window,
        }

    def layer_types(self, values: Mapping[str, Any]) -> list[str]:
        """As transformers has it: what `layer_types` says; without it, windows from layer
        `max_window_layers` (default 28) on, where `use_sliding_window` is on."""
        layers, kinds = int(values["num_hidden_layers"]), values.get("layer_types")
        slides = values.get("use_sliding_window") and values.get("sliding_window", 1) is not None
        if kinds is None:
            first = int(values.get("max_window_layers", 28)) if slides else layers
            return [SLIDING if i >= first else FULL for i in range(layers)]
        if others := sorted({*kinds} - {FULL, SLIDING}):
            raise UserError(f"config.json: layer_types: {others[0]!r} has no counterpart")
        if SLIDING in kinds and not slides:
            raise UserError(
                f"config.json: layer_types has {SLIDING!r}, but use_sliding_window is not true or "
                "sliding_window is null"
            )
        return [*kinds]


class Qwen2(Qwen3):
    """`Qwen2ForCausalLM` (arXiv 2407.10671): Qwen3 with biases instead of norms."""

    name, model_type = "Qwen2ForCausalLM", "qwen2"
    attention: ClassVar = {"qk_norm": False, "qkv_bias": True}


def attention_bonds(ours: str, theirs: str, *, qk_norm: bool, qkv_bias: bool) -> list[Bond]:
    """Of one layer's attention."""
    names = [f"{n}_proj.weight" for n in "qkvo"]
    names += ["q_norm.weight", "k_norm.weight"] if qk_norm else []
    names += [f"{n}_proj.bias" for n in "qkv"] if qkv_bias else []
    return [same(f"{theirs}.self_attn.{n}", f"{ours}.mixer.{n}") for n in names]


def _options(spec: LayerSpec) -> dict[str, Any]:
    return vars(make_options(spec.mixer, spec.options, spec.name))


def _unlike_layer(spec: LayerSpec, attention: Mapping[str, bool]) -> str | None:
    if spec.mixer != "attention" or spec.ffn != "swiglu":
        return f"has attention+swiglu in every layer, not {spec.mixer}+{spec.ffn}"
    options = _options(spec)
    wanted: dict[str, Any] = {"rope": True, "rope_fraction": 1.0, **attention}
    wanted |= {"persistent_tokens": 0, "output_gate": False}
    for key, value in wanted.items():
        if options[key] != value:
            return f"needs {key} {value}, not {options[key]}"
    return None
