"""Hugging Face folders: transformers computes what we do, both ways, and round trips are exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rondo.errors import UserError
from rondo.models import Decoder, ModelConfig, generate, hf
from rondo.models.loading import read_tensors

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

VOCAB, DIM = 40, 32
GATED = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "output_gate": True}
GATED["rope_fraction"] = 0.25
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        {
            "pattern": ["attention"],
            "mixers": {"attention": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": False}},
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
            "pattern": ["gated_deltanet", "attention"],
            "mixers": {
                "attention": GATED,
                "gated_deltanet": {"num_heads": 4, "head_dim": 8, "expand_v": 2},
            },
        },
    ),
}
THEIRS: dict[str, dict[str, Any]] = {
    "Llama": {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
    "Qwen3": {
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 2, "chunk_size": 4},
    "Qwen3Next": {
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "num_experts": 0,
        "mlp_only_layers": [0, 1, 2, 3],
        "num_hidden_layers": 4,
    },
}


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


def written(model: Any) -> torch.Tensor:
    """`tokens()` and eight more of transformers' model, the likeliest each, with its cache."""
    mask = torch.ones_like(tokens())
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(tokens(), attention_mask=mask, **options)


@pytest.mark.parametrize("name", OURS)
def test_written_folders_give_the_same_logits(name: str, tmp_path: Path) -> None:
    model = decoder(name)
    assert hf.write_folder(tmp_path, model.config, model.state_dict()) == OURS[name][0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__ == OURS[name][0]
    with torch.no_grad():
        expected = theirs.eval()(tokens()).logits
        torch.testing.assert_close(our_logits(model, tokens()), expected, rtol=0, atol=1e-4)
    assert torch.equal(written(theirs), generate(model, tokens(), max_tokens=8, temperature=0))
    theirs.save_pretrained(tmp_path / "again")
    config, tensors = hf.read_folder(tmp_path / "again")
    assert config.layers() == hf.read_folder(tmp_path)[0].layers()
    wanted = model.state_dict()
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", OURS)
def test_round_trips_are_exact(name: str, tmp_path: Path) -> None:
    model = decoder(name)
    hf.write_folder(tmp_path, model.config, model.state_dict())
    config, tensors = hf.read_folder(tmp_path)
    wanted = model.state_dict()
    assert tensors.keys() == wanted.keys()
    for key, value in tensors.items():
        assert torch.equal(value, wanted[key]), key
    again = Decoder(config)
    again.load_state_dict(tensors)
    with torch.no_grad():
        assert torch.equal(our_logits(again, tokens()), our_logits(model, tokens()))


@pytest.mark.parametrize("name", THEIRS)
def test_read_folders_give_the_same_logits(name: str, tmp_path: Path) -> None:
    common = {"vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": 2}
    config = getattr(transformers, f"{name}Config")(**{**common, **THEIRS[name]})
    torch.manual_seed(4)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for param in theirs.parameters():
            param += 0.05 * torch.randn_like(param)
    theirs.save_pretrained(tmp_path)
    found, tensors = hf.read_folder(tmp_path)
    model = Decoder(found)
    model.load_state_dict(tensors)
    with torch.no_grad():
        torch.testing.assert_close(
            our_logits(model, tokens()), theirs(tokens()).logits, rtol=0, atol=1e-4
        )
    assert torch.equal(written(theirs), generate(model, tokens(), max_tokens=8, temperature=0))
    hf.write_folder(tmp_path / "again", found, tensors)
    before, after = read_tensors(tmp_path), read_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for key, value in before.items():
        # Norms of Qwen3-Next, stored less one, are rounded as 1 + weight here: by half an ulp.
        moved = name == "Qwen3Next" and "norm" in key and "linear_attn" not in key
        bound = torch.finfo(torch.float32).eps if moved else 0.0
        torch.testing.assert_close(after[key], value, rtol=0, atol=bound, msg=key)


def test_windows_of_qwen3_are_those_that_transformers_derives(tmp_path: Path) -> None:
    """In folders without `layer_types`."""
    values = {**THEIRS["Qwen3"], "vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": 3}
    del values["layer_types"]
    config = transformers.Qwen3Config(**values, max_window_layers=1)
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    kinds = written.pop("layer_types")
    assert kinds == ["full_attention", "sliding_attention", "sliding_attention"]
    path.write_text(json.dumps(written))
    found, tensors = hf.read_folder(tmp_path)
    assert [spec.name for spec in found.layers()] == ["attention", "window", "window"]
    model = Decoder(found)
    model.load_state_dict(tensors)
    with torch.no_grad():
        torch.testing.assert_close(
            our_logits(model, tokens()), theirs(tokens()).logits, rtol=0, atol=1e-4
        )
    path.write_text(json.dumps({**written, "use_sliding_window": False}))
    assert {spec.name for spec in hf.read_folder(tmp_path)[0].layers()} == {"attention"}
    path.write_text(json.dumps({**written, "use_sliding_window": False, "layer_types": kinds}))
    with pytest.raises(UserError, match=r"sliding_attention.* use_sliding_window is not true"):
        hf.read_folder(tmp_path)
    path.write_text(json.dumps({**written, "layer_types": ["chunked_attention"] * 3}))
    with pytest.raises(UserError, match="'chunked_attention' has no counterpart"):
        hf.read_folder(tmp_path)


def test_any_model_is_a_model_of_transformers(tmp_path: Path) -> None:
    """Logits whatever the padding, the loss, `generate` token by token, and saved once more."""
    import rondo.models.hf.modeling  # noqa: F401  (registers it)

    config = ModelConfig(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=3,
        ffn_dim=48,
        pattern=["gla", "attention", "mamba2+none"],
        mixers={
            "gla": {"num_heads": 2},
            "attention": {"num_heads": 2},
            "mamba2": {"head_dim": 8, "state_dim": 4},
        },
        tie_embeddings=True,
    )
    model = Decoder(config, seed=1)
    assert hf.write_folder(tmp_path / "a", config, model.state_dict()) == hf.RONDO
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    ids = tokens()
    with torch.no_grad():
        logits = our_logits(model, ids)
        torch.testing.assert_close(theirs(ids).logits, logits, rtol=0, atol=0)
        mask = torch.ones(2, 15, dtype=torch.long)
        mask[:, :3], mask[:, -1] = 0, 0
        padded = torch.zeros(2, 15, dtype=torch.long)
        padded[:, 3:-1] = ids
        inside = theirs(padded, attention_mask=mask).logits[:, 3:-1]
        torch.testing.assert_close(inside, logits, rtol=1e-5, atol=1e-5)
        loss = theirs(ids, labels=ids).loss
        expected = model.loss(ids[:, :-1], ids[:, 1:], reduction="mean")
        torch.testing.assert_close(loss, expected)
        new = theirs.generate(padded[:, :-1], attention_mask=mask[:, :-1], max_new_tokens=6)
        slow = theirs.generate(
            padded[:, :-1], attention_mask=mask[:, :-1], max_new_tokens=6, use_cache=False
        )
        beams = theirs.generate(ids, max_new_tokens=4, num_beams=2)
        assert torch.equal(
            beams, theirs.generate(ids, max_new_tokens=4, num_beams=2, use_cache=False)
        )
    assert torch.equal(new, slow)
    row = ids[:1]
    for token in new[0, 14:]:
        assert our_logits(model, row)[0, -1].argmax() == token
        row = torch.cat([row, token.view(1, 1)], 1)
    theirs.save_pretrained(tmp_path / "b")
    found, tensors = hf.read_folder(tmp_path / "b")
    assert found == config
    for key, value in model.state_dict().items():
        assert torch.equal(tensors[key], value), key


def test_decays_stay_float32_in_a_bfloat16_folder(tmp_path: Path) -> None:
    """In our class through loading, too; in one of transformers' in the folder alone."""
    import rondo.models.hf.modeling  # noqa: F401  (registers it)

    model = decoder("mamba2")
    for name in (hf.RONDO, "Mamba2ForCausalLM"):
        folder = tmp_path / name
        hf.write_folder(
            folder, model.config, model.state_dict(), architecture=name, dtype=torch.bfloat16
        )
        tensors = hf.read_folder(folder)[1]
        for key, value in model.state_dict().items():
            whole = key in model.float32_names()
            assert whole == (key.split(".")[-1] in ("A_log", "dt_bias", "D"))
            expected = value if whole else value.bfloat16()
            assert torch.equal(tensors[key].float(), expected.float()), (name, key)
    for dtype in ("auto", torch.float16):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / hf.RONDO, dtype=dtype)
        found = theirs.decoder.state_dict()
        for key in model.state_dict():
            if key in model.float32_names():
                assert torch.equal(found[key], model.state_dict()[key]), key
            else:
                assert found[key].dtype == (torch.bfloat16 if dtype == "auto" else dtype), key
        assert theirs(tokens()).logits.isfinite().all()


def test_what_has_no_counterpart_is_named(tmp_path: Path) -> None:
    model = decoder("qwen3")
    with pytest.raises(UserError, match="LlamaForCausalLM needs qk_norm False, not True"):
        hf.write_folder(tmp_path, model.config, model.state_dict(), architecture="LlamaForCausalLM")
    with pytest.raises(UserError, match=r"unknown 'Llama' .*LlamaForCausalLM"):
        hf.write_folder(tmp_path, model.config, model.state_dict(), architecture="Llama")
    config = transformers.LlamaConfig(**THEIRS["Llama"], vocab_size=VOCAB, hidden_size=DIM)
    config.num_hidden_layers, config.attention_bias = 1, True
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "bias")
    with pytest.raises(UserError, match="attention_bias True has no counterpart"):
        hf.read_folder(tmp_path / "bias")
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=DIM, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="architecture 'GPT2LMHeadModel' is unknown"):
        hf.read_folder(tmp_path / "other")
    with pytest.raises(UserError, match=r"no config\.json"):
        hf.read_folder(tmp_path / "nowhere")
