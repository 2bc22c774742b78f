"""Small models of every architecture, ours and transformers', and how far their logits are apart.

`python -m rondo.tests.models.hf_cases` prints the table of `models/hf/README.md`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from rondo.models import Decoder, ModelConfig, hf
from rondo.models.config import make_options

VOCAB, DIM = 40, 32
GATED = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "output_gate": True}
DELTA = {"num_heads": 4, "head_dim": 8, "expand_v": 2}
HYBRID = {"pattern": ["gated_deltanet", "attention"]}
SLOWER = {"factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 4.0}
SLOWER["original_max_position_embeddings"] = 40  # of 4 frequencies 1 stays, 1 is between
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        {
            "pattern": ["attention"],
            "mixers": {"attention": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": False}},
        },
    ),
    "llama3": (
        "LlamaForCausalLM",
        {
            "pattern": ["attention"],
            "mixers": {"attention": {"num_heads": 4, "qk_norm": False, "rope_scaling": SLOWER}},
        },
    ),
    "mistral": (
        "MistralForCausalLM",
        {
            "pattern": ["attention"],
            "mixers": {"attention": {"num_heads": 4, "qk_norm": False, "window": 3}},
        },
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        {
            "pattern": ["attention"],
            "mixers": {"attention": {"num_heads": 4, "qk_norm": False, "qkv_bias": True}},
        },
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        {
            "pattern": ["window", "attention"],
            "mixers": {
                "attention": {"num_heads": 4, "rope_theta": 500.0},
                "window": {
                    "kind": "attention",
                    "num_heads": 4,
                    "rope_theta": 500.0,
                    "window": 3,
                },
            },
            "tie_embeddings": True,
        },
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        {
            "pattern": ["mamba2+none"],
            "mixers": {"mamba2": {"head_dim": 8, "state_dim": 4, "num_groups": 2}},
        },
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {
            **HYBRID,
            "mixers": {"attention": {**GATED, "rope_fraction": 0.25}, "gated_deltanet": DELTA},
        },
    ),
    "qwen3_next, half turned": (
        "Qwen3NextForCausalLM",
        {
            **HYBRID,
            "mixers": {
                "attention": {**GATED, "rope_fraction": 0.5, "rope_scaling": SLOWER},
                "gated_deltanet": DELTA,
            },
        },
    ),
    "qwen3_next, all turned": (
        "Qwen3NextForCausalLM",
        {**HYBRID, "mixers": {"attention": GATED, "gated_deltanet": DELTA}},
    ),
}
GROUPED = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
WINDOWS = {"use_sliding_window": True, "sliding_window": 3}
WINDOWS["layer_types"] = ["sliding_attention", "full_attention"]
NEXT = {
    **GROUPED,
    "head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "num_experts": 0,
    "mlp_only_layers": [0, 1, 2, 3],
    "num_hidden_layers": 4,
}


def turned(fraction: float) -> dict[str, Any]:
    """What config.json says where RoPE turns this share of a head's channels."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": fraction}
    return {"rope_parameters": rope}


THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "llama3": (
        "Llama",
        {
            **GROUPED,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **SLOWER},
            "max_position_embeddings": 320,
        },
    ),
    "mistral": ("Mistral", {**GROUPED, "head_dim": 16, "sliding_window": 3}),
    "mistral without windows": ("Mistral", {**GROUPED, "sliding_window": None}),
    "qwen2": ("Qwen2", {**GROUPED, **WINDOWS}),
    "qwen3": ("Qwen3", {**GROUPED, **WINDOWS, "head_dim": 8, "tie_word_embeddings": True}),
    "mamba2": (
        "Mamba2",
        {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 2, "chunk_size": 4},
    ),
    "qwen3_next": ("Qwen3Next", NEXT),
    "qwen3_next, half turned": ("Qwen3Next", {**NEXT, **turned(0.5)}),
    "qwen3_next, all turned": ("Qwen3Next", {**NEXT, **turned(1.0)}),
}


def layers(config: ModelConfig) -> list[dict[str, Any]]:
    """All that is computed in each layer, whether the configuration says it or it is a default."""
    found = []
    for spec in config.layers():
        options = vars(make_options(spec.mixer, spec.options, spec.name)).copy()
        if spec.mixer == "attention":
            options["num_kv_heads"] = options["num_kv_heads"] or options["num_heads"]
            options["head_dim"] = options["head_dim"] or config.dim // options["num_heads"]
        found.append({"mixer": spec.mixer, "ffn": spec.ffn, **options})
    return found


def decoder(name: str) -> Decoder:
    """A model of ours whose vectors are not all alike."""
    config = ModelConfig(vocab_size=VOCAB, dim=DIM, num_layers=2, ffn_dim=48, **OURS[name][1])
    model = Decoder(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.randn(param.shape, generator=generator)
            param += (0.1 if param.ndim > 1 else 0.02) * noise
    return model


def tokens(batch: int = 2, time: int = 11) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(3))


def our_logits(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model(ids, return_state=False).hidden)


def their_model(name: str) -> Any:
    """A model of transformers whose vectors are not all alike."""
    kind, values = THEIRS[name]
    common = {"vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": 2}
    config = getattr(transformers, f"{kind}Config")(**{**common, **values})
    torch.manual_seed(4)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for param in theirs.parameters():
            param += 0.05 * torch.randn_like(param)
    return theirs


def written(model: Decoder, folder: Path) -> Any:
    """What transformers makes of our model."""
    hf.write_folder(folder, model.config, model.state_dict())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return theirs.eval()


def read(theirs: Any, folder: Path) -> Decoder:
    """What we make of transformers' model."""
    theirs.save_pretrained(folder)
    config, tensors = hf.read_folder(folder)
    model = Decoder(config)
    model.load_state_dict(tensors)
    return model


@torch.no_grad()
def difference(ours: Decoder, theirs: Any) -> float:
    """The largest, absolute, between the logits of both for `tokens()`."""
    return float((our_logits(ours, tokens()) - theirs(tokens()).logits).abs().max())


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("| model | theirs of ours | ours of theirs |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in THEIRS:
            row = ["none"] * 2
            if name in OURS:
                model = decoder(name)
                row[0] = f"{difference(model, written(model, Path(folder, name, '0'))):.1e}"
            theirs = their_model(name)
            row[1] = f"{difference(read(theirs, Path(folder, name, '1')), theirs):.1e}"
            print(f"| {name} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
