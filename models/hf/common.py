"""What Hugging Face's configurations have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rondo.errors import UserError
from rondo.models.config import LayerSpec, ModelConfig, make_options
from rondo.models.hf.bonds import Bond, same


def sizes(config: ModelConfig) -> dict[str, Any]:
    """Keys that every architecture has."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.inner_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "initializer_range": config.init_std,
    }


def attention_values(config: ModelConfig, spec: LayerSpec) -> dict[str, Any]:
    """Keys of attention, from one layer's options."""
    options = make_options(spec.mixer, spec.options, spec.name)
    heads = options.num_heads or max(1, config.dim // 64)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": options.rope_theta}
    if options.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dataclasses.asdict(options.rope_scaling)}
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": options.num_kv_heads or heads,
        "head_dim": options.head_dim or config.dim // heads,
        "attention_bias": False,
        # Libraries before transformers 5 read the first two.
        "rope_theta": options.rope_theta,
        "rope_scaling": rope if options.rope_scaling is not None else None,
        "rope_parameters": rope,
    }


def rope_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of rotary frequencies."""
    # Where both are given, transformers takes the older one.
    return values.get("rope_scaling") or values.get("rope_parameters") or {}


def read_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of rotary frequencies. Raises UserError for a kind that attention has not."""
    rope = rope_values(values)
    theta = float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise UserError(
            f"config.json: rope_type {kind!r} has no counterpart; 'default' and 'llama3' have"
        )
    names = ("factor", "low_freq_factor", "high_freq_factor")
    scaling: dict[str, Any] = {name: float(rope[name]) for name in names}
    length = "original_max_position_embeddings"
    scaling[length] = int(rope.get(length) or values["max_position_embeddings"])
    return {"rope_theta": theta, "rope_scaling": scaling}


def refuse(values: Mapping[str, Any], **expected: Any) -> None:
    """Raises UserError where a key has another value than the one we can stand for."""
    for key, value in expected.items():
        if values.get(key, value) != value:
            raise UserError(
                f"config.json: {key} {values[key]!r} has no counterpart; only {value!r} has"
            )


def matrices(config: ModelConfig, embedding: str) -> list[Bond]:
    """Embedding and output matrix."""
    found = [same(f"{embedding}.weight", "embedding.weight")]
    return found if config.tie_embeddings else [*found, same("lm_head.weight", "head.weight")]


def swiglu_bonds(ours: str, theirs: str) -> list[Bond]:
    """The channel mixer of one layer."""
    names = ("gate_proj", "up_proj", "down_proj")
    return [same(f"{theirs}.mlp.{n}.weight", f"{ours}.ffn.{n}.weight") for n in names]
