"""Whatever a configuration says, its Hugging Face folder is the same model."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rondo.models import Decoder, ModelConfig, hf

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

from rondo.tests.models.hf_cases import (  # noqa: E402
    SLOWER,
    VOCAB,
    difference,
    layers,
    our_logits,
    tokens,
    written,
)

Options = dict[str, Any]


def attention(dice: random.Random) -> Options:
    """Options that any of the architectures might have; some that none has."""
    options: Options = {"num_heads": (heads := dice.choice([2, 4]))}
    options["num_kv_heads"] = dice.choice([None, 1, heads])
    options["head_dim"] = dice.choice([None, 8, 16, 24])
    options["qk_norm"] = dice.random() < 0.5
    options["qkv_bias"] = dice.random() < 0.3
    rare = {
        "window": dice.choice([1, 3, 64]),
        "rope_theta": dice.choice([100.0, 500000.0]),
        "rope_scaling": SLOWER,
        "rope_fraction": dice.choice([0.25, 0.5]),
        "output_gate": True,
        "rope": False,
        "persistent_tokens": 2,
    }
    return options | {key: value for key, value in rare.items() if dice.random() < 0.07}


def only_attention(dice: random.Random) -> Options:
    first = attention(dice)
    second = {"kind": "attention", **first, "window": dice.choice([1, 3])}
    pattern = dice.choice([["attention"], ["attention", "second"]])
    return {"pattern": pattern, "mixers": {"attention": first, "second": second}}


def mamba2(dice: random.Random) -> Options:
    options = {
        "expand": dice.choice([1, 2, 3]),
        "head_dim": dice.choice([8, 16]),
        "state_dim": dice.choice([4, 8]),
        "num_groups": dice.choice([1, 2]),
        "conv_width": dice.choice([2, 4]),
    }
    return {
        "pattern": [dice.choice(["mamba2+none"] * 3 + ["mamba2"])],
        "mixers": {"mamba2": options},
    }


def hybrid(dice: random.Random) -> Options:
    gated = {"output_gate": True, "qk_norm": True, "qkv_bias": False, "window": None}
    gated |= {"rope": True, "persistent_tokens": 0}
    gated["rope_fraction"] = dice.choice([0.25, 0.5, 1.0])
    deltanet = {
        "num_heads": dice.choice([1, 2, 4]),
        "head_dim": dice.choice([4, 8]),
        "expand_v": dice.choice([0.5, 1, 1.5, 2]),
        "conv_width": dice.choice([2, 4]),
        "output_gate": dice.random() < 0.9,
        "negative_eigenvalues": dice.random() < 0.1,
    }
    pattern = dice.choice([["gated_deltanet", "attention"], ["attention", "gated_deltanet*2"]])
    mixers = {"attention": {**attention(dice), **gated}, "gated_deltanet": deltanet}
    return {"pattern": pattern, "mixers": mixers}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            only_attention,
            {
                "LlamaForCausalLM",
                "MistralForCausalLM",
                "Qwen2ForCausalLM",
                "Qwen3ForCausalLM",
            },
        ),
        (mamba2, {"Mamba2ForCausalLM"}),
        (hybrid, {"Qwen3NextForCausalLM"}),
    ],
)
def test_a_folder_is_the_model_or_ours(
    kind: Callable[[random.Random], Options], names: set[str], tmp_path: Path
) -> None:
    dice, found = random.Random(0), set()
    for number in range(32):
        config = ModelConfig(
            vocab_size=VOCAB,
            dim=32,
            num_layers=dice.choice([2, 3]),
            ffn_dim=dice.choice([0, 48]),
            norm_eps=dice.choice([1e-5, 1e-6]),
            tie_embeddings=dice.random() < 0.3,
            zero_centered_norms=dice.random() < 0.2,
            init_std=0.1,
            **kind(dice),
        )
        name = hf.choose(config)
        found.add(name)
        if name == hf.RONDO:
            continue
        torch.manual_seed(number)
        model = Decoder(config, seed=number)
        with torch.no_grad():
            for param in model.parameters():
                param += 0.05 * torch.randn_like(param)
        folder = tmp_path / str(number)
        assert difference(model, written(model, folder)) <= 1e-4, config
        again, tensors = hf.read_folder(folder)
        assert layers(again) == layers(config)
        assert all(torch.equal(tensors[key], x) for key, x in model.state_dict().items()), config
        back = Decoder(again)
        back.load_state_dict(tensors)
        with torch.no_grad():
            assert torch.equal(our_logits(back, tokens()), our_logits(model, tokens())), config
    assert found >= {*names, hf.RONDO}
