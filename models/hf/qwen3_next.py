"""Qwen3NextForCausalLM: Gated DeltaNet and gated attention, without experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rondo.errors import UserError
from rondo.models.config import LayerSpec, ModelConfig, make_options
from rondo.models.hf.bonds import Bond, same
from rondo.models.hf.common import (
    attention_values,
    matrices,
    read_rope,
    refuse,
    rope_values,
    sizes,
    swiglu_bonds,
)
from rondo.models.hf.llama import NORMS
from rondo.models.mixers.gated_deltanet import GatedDeltaNet

ZERO_CENTERED = "rondo_zero_centered_norms"
"""A key of ours in their config.json: how our norms say what theirs do. Without it they are
zero-centred."""
FRACTION, DEFAULT_FRACTION = "partial_rotary_factor", 0.25
"""The share of a head's channels that RoPE turns, and that of transformers, where config.json does
not say it."""
KINDS = {"gated_deltanet": "linear_attention", "attention": "full_attention"}
_ATTENTION = {
    "rope": True,
    "qk_norm": True,
    "qkv_bias": False,
    "output_gate": True,
    "window": None,
    "persistent_tokens": 0,
}
_DELTANET = {"output_gate": True, "negative_eigenvalues": False}


class Qwen3Next:
    """`Qwen3NextForCausalLM`, with SwiGLU in every layer and as many key heads as value heads."""

    name, model_type = "Qwen3NextForCausalLM", "qwen3_next"

    def unlike(self, config: ModelConfig) -> str | None:
        """Why a model of ours is none of these; None if it is one."""
        specs = config.layers()
        for spec in specs:
            if spec.mixer not in KINDS or spec.ffn != "swiglu":
                return f"{self.name} has no layer {spec.mixer}+{spec.ffn}"
            options = vars(make_options(spec.mixer, spec.options, spec.name))
            wanted = _ATTENTION if spec.mixer == "attention" else _DELTANET
            for key, value in wanted.items():
                if options[key] != value:
                    return f"{self.name} needs {spec.name}.{key} {value}, not {options[key]}"
        for kind in KINDS:
            options = [spec.options for spec in specs if spec.mixer == kind]
            if not options:
                return f"{self.name} has layers of {kind}"
            if any(o != options[0] for o in options):
                return f"{self.name} has the same {kind} in every layer"
        return None

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """What their config.json says of it."""
        specs = config.layers()
        attention = next(spec for spec in specs if spec.mixer == "attention")
        heads, keys, values = _deltanet(config)
        deltanet = make_options("gated_deltanet", _spec(specs, "gated_deltanet").options)
        return {
            **sizes(config),
            **_attention_values(config, attention),
            ZERO_CENTERED: config.zero_centered_norms,
            "layer_types": [KINDS[spec.mixer] for spec in specs],
            "linear_num_key_heads": heads,
            "linear_num_value_heads": heads,
            "linear_key_head_dim": keys,
            "linear_value_head_dim": values,
            "linear_conv_kernel_dim": deltanet.conv_width,
            "num_experts": 0,
            "mlp_only_layers": list(range(config.num_layers)),
            "decoder_sparse_step": 1,
        }

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of our configuration, from their config.json. Raises UserError."""
        layers = int(values["num_hidden_layers"])
        refuse(values, attention_bias=False, hidden_act="silu")
        dense = sorted(values.get("mlp_only_layers") or [])
        if values.get("num_experts", 0) and dense != list(range(layers)):
            raise UserError("config.json: num_experts: layers with experts have no counterpart")
        heads = int(values["linear_num_value_heads"])
        if int(values["linear_num_key_heads"]) != heads:
            raise UserError(
                f"config.json: linear_num_key_heads {values['linear_num_key_heads']} is not "
                f"linear_num_value_heads {heads}, which has no counterpart"
            )
        keys, width = int(values["linear_key_head_dim"]), int(values["linear_value_head_dim"])
        fraction = rope_values(values).get(FRACTION, values.get(FRACTION, DEFAULT_FRACTION))
        kinds = {theirs: ours for ours, theirs in KINDS.items()}
        every = values.get("full_attention_interval", 4)
        types = values.get("layer_types") or [
            "full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)
        ]
        return {
            "vocab_size": int(values["vocab_size"]),
            "dim": int(values["hidden_size"]),
            "num_layers": layers,
            "ffn_dim": int(values["intermediate_size"]),
            "norm_eps": float(values["rms_norm_eps"]),
            "zero_centered_norms": bool(values.get(ZERO_CENTERED, True)),
            "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
            "pattern": [kinds[kind] for kind in types],
            "mixers": {
                "gated_deltanet": {
                    "num_heads": heads,
                    "head_dim": keys,
                    "expand_v": width / keys,
                    "conv_width": int(values["linear_conv_kernel_dim"]),
                },
                "attention": {
                    "num_heads": int(values["num_attention_heads"]),
                    "num_kv_heads": int(values["num_key_value_heads"]),
                    "head_dim": int(values["head_dim"]),
                    **read_rope(values),
                    "rope_fraction": float(fraction),
                    "output_gate": True,
                },
            },
        }

    def bonds(self, config: ModelConfig) -> list[Bond]:
        """All tensors."""
        found = matrices(config, "model.embed_tokens")
        found.append(_norm(config, "model.norm", "norm"))
        for i, spec in enumerate(config.layers()):
            ours, theirs = f"blocks.{i}", f"model.layers.{i}"
            found += [_norm(config, f"{theirs}.{b}", f"{ours}.{a}") for a, b in NORMS.items()]
            make = _attention if spec.mixer == "attention" else _linear
            found += make(config, spec, f"{ours}.mixer", theirs)
            found += swiglu_bonds(ours, theirs)
        return found


def _attention_values(config: ModelConfig, spec: LayerSpec) -> dict[str, Any]:
    values = attention_values(config, spec)
    fraction = make_options(spec.mixer, spec.options, spec.name).rope_fraction
    for key in ("rope_parameters", "rope_scaling"):
        if values[key] is not None:
            values[key] = {**values[key], FRACTION: fraction}
    return {**values, FRACTION: fraction}  # libraries before transformers 5 read it there


def _norm(config: ModelConfig, theirs: str, ours: str) -> Bond:
    """Theirs multiply by 1 + weight, as zero-centred ones of ours do. Others are written less one
    in float64: exact for 0, from 2^-30 on and below -2^-29; float32 is so from 1/2 on alone."""
    if config.zero_centered_norms:
        return same(f"{theirs}.weight", f"{ours}.offset")
    names = f"{theirs}.weight", (f"{ours}.weight",)
    return Bond(*names, lambda parts: parts[0].double() - 1, lambda x: [x.double() + 1])


def _interleaved(theirs: str, ours: Sequence[str], heads: int, rows: Sequence[int]) -> Bond:
    """Ours, head by head side by side; `rows`: how many each has of a head."""

    def pack(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.unflatten(0, (heads, -1)) for x in parts], dim=1).flatten(0, 1)

    def unpack(whole: Tensor) -> list[Tensor]:
        parts = whole.unflatten(0, (heads, -1)).split([*rows], dim=1)
        return [x.flatten(0, 1) for x in parts]

    return Bond(theirs, tuple(ours), pack, unpack)


def _attention(config: ModelConfig, spec: LayerSpec, ours: str, theirs: str) -> list[Bond]:
    values, there = attention_values(config, spec), f"{theirs}.self_attn"
    heads, width = values["num_attention_heads"], values["head_dim"]
    queries = [f"{ours}.q_proj.weight", f"{ours}.gate_proj.weight"]
    return [
        _interleaved(f"{there}.q_proj.weight", queries, heads, [width, width]),
        *(
            same(f"{there}.{n}.weight", f"{ours}.{n}.weight")
            for n in ("k_proj", "v_proj", "o_proj")
        ),
        *(_norm(config, f"{there}.{n}", f"{ours}.{n}") for n in ("q_norm", "k_norm")),
    ]


def _linear(config: ModelConfig, spec: LayerSpec, ours: str, theirs: str) -> list[Bond]:
    heads, keys, values = _deltanet(config)
    there = f"{theirs}.linear_attn"
    projections = [f"{ours}.{n}_proj.weight" for n in ("q", "k", "v", "gate")]
    gates = [f"{ours}.{n}_proj.weight" for n in ("beta", "decay")]
    channels = [heads * keys, heads * keys, heads * values]
    return [
        _interleaved(
            f"{there}.in_proj_qkvz.weight", projections, heads, [keys, keys, values, values]
        ),
        _interleaved(f"{there}.in_proj_ba.weight", gates, heads, [1, 1]),
        Bond(
            f"{there}.conv1d.weight",
            tuple(f"{ours}.{n}_conv.weight" for n in ("q", "k", "v")),
            lambda parts: torch.cat([*parts]).unsqueeze(1),
            lambda whole: whole.squeeze(1).split(channels),
        ),
        *(same(f"{there}.{n}", f"{ours}.{n}") for n in ("A_log", "dt_bias", "norm.weight")),
        same(f"{there}.out_proj.weight", f"{ours}.o_proj.weight"),
    ]


def _spec(specs: Sequence[LayerSpec], mixer: str) -> LayerSpec:
    return next(spec for spec in specs if spec.mixer == mixer)


def _deltanet(config: ModelConfig) -> tuple[int, int, int]:
    spec = _spec(config.layers(), "gated_deltanet")
    return GatedDeltaNet.sizes(config, make_options("gated_deltanet", spec.options, spec.name))
