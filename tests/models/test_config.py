"""Model configuration: patterns, presets, impossible numbers."""

from __future__ import annotations

import pytest
import torch

from rondo.errors import UserError
from rondo.models import Decoder, ModelConfig, from_preset, preset_names
from rondo.models.config import preset_values, problems

pytestmark = pytest.mark.quick


def mixers(config: ModelConfig) -> list[str]:
    return [layer.mixer for layer in config.layers()]


def test_pattern_repeats_to_the_number_of_layers() -> None:
    config = ModelConfig(num_layers=9, pattern=["gated_deltanet*3", "attention"])
    full = [i for i, name in enumerate(mixers(config)) if name == "attention"]
    assert full == [3, 7]  # layer i is full attention iff (i + 1) % 4 == 0
    assert len(config.layers()) == 9


def test_entries_name_channel_mixers_and_aliases() -> None:
    config = ModelConfig(
        num_layers=3,
        pattern=["mamba2+none", "local", "attention"],
        mixers={"local": {"kind": "attention", "window": 16}},
    )
    first, second, third = config.layers()
    assert (first.mixer, first.ffn) == ("mamba2", "none")
    assert (second.mixer, second.options, second.ffn) == ("attention", {"window": 16}, "swiglu")
    assert third.options == {}
    assert problems(config) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 0}, ["model.dim", "0"]),
        ({"num_layers": 0}, ["model.num_layers", "0"]),
        ({"init_std": float("nan")}, ["model.init_std", "nan"]),
        ({"logit_cap": 0.0}, ["model.logit_cap", "above 0, or null, got 0.0"]),
        ({"logit_cap": -30.0}, ["model.logit_cap", "-30.0"]),
        ({"logit_cap": float("nan")}, ["model.logit_cap", "nan"]),
        ({"logit_cap": float("inf")}, ["model.logit_cap", "inf"]),
        ({"pattern": []}, ["model.pattern", "[]"]),
        ({"pattern": ["gated_deltanets"]}, ["gated_deltanets", "did you mean 'gated_deltanet'"]),
        ({"pattern": ["attention+swigl"]}, ["swigl", "did you mean 'swiglu'"]),
        ({"pattern": ["attention*0"]}, ["model.pattern", "attention*0"]),
        ({"mixers": {"attentio": {}}}, ["model.mixers.attentio", "did you mean 'attention'"]),
        ({"mixers": {"attention": {"heads": 3}}}, ["attention.heads", "num_heads"]),
        ({"mixers": {"attention": {"num_heads": "3"}}}, ["attention.num_heads", "'3'"]),
        ({"mixers": {"attention": {"num_heads": True}}}, ["attention.num_heads", "True"]),
        ({"mixers": {"attention": {"num_heads": 3}}}, ["num_heads", "64", "3"]),
        ({"mixers": {"attention": {"num_heads": 0, "head_dim": 8}}}, ["num_heads", "0"]),
        (
            {"mixers": {"attention": {"num_heads": 4, "num_kv_heads": 3}}},
            ["num_kv_heads", "4", "3"],
        ),
        ({"mixers": {"attention": {"window": 0}}}, ["window", "0"]),
        ({"mixers": {"attention": {"rope_scaling": 8.0}}}, ["rope_scaling: expected a map", "8.0"]),
        (
            {"mixers": {"attention": {"rope_scaling": {"factors": 8.0}}}},
            ["attention.rope_scaling.factors", "did you mean 'factor'"],
        ),
        ({"mixers": {"attention": {"rope_scaling": {"factor": 0}}}}, ["rope_scaling.factor", "0"]),
        (
            {"mixers": {"attention": {"rope_scaling": {"high_freq_factor": 1.0}}}},
            ["rope_scaling.low_freq_factor: 1 must be below high_freq_factor 1"],
        ),
        (
            {"pattern": ["mamba2"], "mixers": {"mamba2": {"head_dim": 48}}},
            ["head_dim", "128", "48"],
        ),
        ({"pattern": ["gla"], "mixers": {"gla": {"num_heads": 5}}}, ["num_heads", "32", "5"]),
        ({"pattern": ["hgrn2"], "mixers": {"hgrn2": {"head_dim": 7}}}, ["head_dim", "64", "7"]),
        ({"pattern": ["retnet"], "mixers": {"retnet": {"num_heads": 5}}}, ["num_heads", "64", "5"]),
        ({"pattern": ["deltanet"], "mixers": {"deltanet": {"conv_width": 0}}}, ["conv_width", "0"]),
        (
            {"pattern": ["gated_deltanet"], "mixers": {"gated_deltanet": {"max_step": 0.0}}},
            ["max_step", "0.0"],
        ),
    ],
)
def test_impossible_configurations_are_named(changes: dict, words: list[str]) -> None:
    config = ModelConfig(**{"dim": 64, "num_layers": 4, **changes})
    message = "\n".join(problems(config))
    for word in words:
        assert word in message
    with pytest.raises(UserError):
        Decoder(ModelConfig(**{"dim": 64, "num_layers": 4, "vocab_size": 8, **changes}))


def test_heads_of_gated_deltanet_forget_as_slowly_as_max_step_says() -> None:
    def steps(**options: float) -> torch.Tensor:
        given = {"gated_deltanet": {"num_heads": 64, "head_dim": 8, **options}}
        config = ModelConfig(vocab_size=8, dim=64, num_layers=1, pattern=["gated_deltanet"])
        config.mixers = given
        mixer = Decoder(config, seed=0).blocks["0"].mixer
        return torch.nn.functional.softplus(mixer.get_parameter("dt_bias"))  # type: ignore[union-attr]

    usual, slow = steps(), steps(max_step=1e-3)
    assert 0.9e-3 < usual.min() < 2e-3 and 0.05 < usual.max() < 0.11
    assert torch.allclose(slow, usual / 100)


def test_all_problems_come_at_once() -> None:
    message = "\n".join(problems(ModelConfig(dim=0, num_layers=-1, norm_eps=0.0)))
    assert all(key in message for key in ("model.dim", "model.num_layers", "model.norm_eps"))


@pytest.mark.parametrize("name", preset_names())
def test_presets_have_the_parameters_they_claim(name: str) -> None:
    import yaml

    from rondo.models import config as module

    preset = yaml.safe_load((module._PRESETS / f"{name}.yaml").read_text())
    claimed = preset["parameters"]
    with torch.device("meta"):
        model = Decoder(from_preset(name))
    assert sum(p.numel() for p in model.parameters()) == claimed == model.cost(4096).parameters
    assert model.active_parameters() == preset.get("active", claimed)
    size = name.rsplit("-", 1)[1]
    size = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    assert 0.9 < claimed / size < 1.2


def test_xlstm_7b_caps_its_logits() -> None:
    assert from_preset("xlstm-7b").logit_cap == 30.0


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'gated-deltanet-7b'"):
        preset_values("gated-deltanet-7")
