"""Hugging Face folders: transformers computes what we do, both ways, and round trips are exact."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rondo.errors import UserError
from rondo.models import Decoder, ModelConfig, generate, hf
from rondo.models.loading import read_tensors

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

from rondo.tests.models.hf_cases import (  # noqa: E402
    DIM,
    GROUPED,
    OURS,
    SLOWER,
    THEIRS,
    VOCAB,
    WINDOWS,
    decoder,
    difference,
    layers,
    our_logits,
    read,
    their_model,
    tokens,
    written,
)


def continued(model: Any) -> torch.Tensor:
    """`tokens()` and eight more of transformers' model, the likeliest each, with its cache."""
    mask = torch.ones_like(tokens())
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(tokens(), attention_mask=mask, **options)


@pytest.mark.parametrize("name", OURS)
def test_written_folders_give_the_same_logits(name: str, tmp_path: Path) -> None:
    model = decoder(name)
    theirs = written(model, tmp_path)
    assert type(theirs).__name__ == OURS[name][0]
    assert difference(model, theirs) <= 1e-4
    assert torch.equal(continued(theirs), generate(model, tokens(), max_tokens=8, temperature=0))
    theirs.save_pretrained(tmp_path / "again")
    config, tensors = hf.read_folder(tmp_path / "again")
    assert layers(config) == layers(hf.read_folder(tmp_path)[0]) == layers(model.config)
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


def test_norms_of_any_size_come_back_as_they_were(tmp_path: Path) -> None:
    """Those of Qwen3-Next are stored less one, which float32 rounds for weights below 1/2."""
    model = decoder("qwen3_next")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("norm.weight"):
                param.copy_(0.01 * 400 ** torch.rand(param.shape, generator=generator))
        norm = model.get_parameter("norm.weight")
        norm[:5] = torch.tensor([0.01, 4.0, 0.0, -0.3, 2**-30 * (1 + 2**-23)])
    wanted = model.state_dict()
    small = [x for key, x in wanted.items() if key.endswith("norm.weight") and (x < 0.5).any()]
    assert len(small) > 6 and not torch.equal((norm - 1) + 1, norm)
    theirs = written(model, tmp_path)
    assert {param.dtype for param in theirs.parameters()} == {torch.float32}
    assert difference(model, theirs) <= 1e-4
    found = hf.read_folder(tmp_path)[1]
    assert all(torch.equal(found[key], x) for key, x in wanted.items())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)  # the type config.json says
    assert {param.dtype for param in plain.parameters()} == {torch.float32}
    hf.write_folder(tmp_path / "half", model.config, wanted, dtype=torch.bfloat16)
    kinds = {key: value.dtype for key, value in read_tensors(tmp_path / "half").items()}
    assert kinds["model.norm.weight"] == torch.bfloat16


@pytest.mark.parametrize("name", THEIRS)
def test_read_folders_give_the_same_logits(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    model = read(theirs, tmp_path)
    assert difference(model, theirs) <= 1e-4
    assert torch.equal(continued(theirs), generate(model, tokens(), max_tokens=8, temperature=0))
    hf.write_folder(tmp_path / "again", model.config, model.state_dict())
    before, after = read_tensors(tmp_path), read_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    assert hf.read_folder(tmp_path / "again")[0].layers() == model.config.layers()
    if type(theirs).__name__ == hf.choose(model.config):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
        found = again.state_dict()
        assert all(torch.equal(found[key], value) for key, value in theirs.state_dict().items())
        with torch.no_grad():  # where they lie in memory decides the last bits of sums
            assert (again(tokens()).logits - theirs(tokens()).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "option", "other"),
    [
        ("mistral", "window", 2),
        ("mistral", "window", 4),
        ("llama3", "rope_scaling", None),
        ("llama3", "rope_scaling", {**SLOWER, "factor": 4.0}),
        ("llama3", "rope_scaling", {**SLOWER, "low_freq_factor": 0.6}),
        ("qwen3_next", "rope_fraction", 1.0),
        ("qwen3_next, half turned", "rope_fraction", 0.25),
        ("qwen3_next, all turned", "rope_fraction", 0.25),
    ],
)
def test_options_show_in_logits(name: str, option: str, other: Any, tmp_path: Path) -> None:
    """So that one read or written wrongly would have shown above: a window by one key, too."""
    theirs = their_model(name)
    model = read(theirs, tmp_path)
    for kind, options in model.config.mixers.items():
        if kind != "gated_deltanet":
            options[option] = other
    changed = Decoder(model.config)
    changed.load_state_dict(model.state_dict())
    assert difference(changed, theirs) > 2e-4


def test_rotations_are_read_in_the_form_of_earlier_versions(tmp_path: Path) -> None:
    """`rope_scaling` beside `rope_theta`, as published folders of Llama 3.1 have them."""
    theirs = their_model("llama3")
    model = read(theirs, tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    theta = values["rope_parameters"].pop("rope_theta")
    values |= {"rope_scaling": values.pop("rope_parameters"), "rope_theta": theta}
    path.write_text(json.dumps(values))
    assert hf.read_folder(tmp_path)[0] == model.config
    values["rope_scaling"]["rope_type"] = "yarn"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="rope_type 'yarn' has no counterpart"):
        hf.read_folder(tmp_path)
    values["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="low_freq_factor is missing"):
        hf.read_folder(tmp_path)


def test_windows_of_qwen3_are_those_that_transformers_derives(tmp_path: Path) -> None:
    """In folders without `layer_types`."""
    values = {**GROUPED, **WINDOWS, "vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": 3}
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
        logit_cap=0.1,
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


@pytest.mark.parametrize("name", OURS)
def test_a_cap_on_logits_is_in_our_class_alone(name: str) -> None:
    model = decoder(name)
    assert hf.choose(model.config) != hf.RONDO
    config = dataclasses.replace(model.config, logit_cap=30.0)
    assert hf.choose(config) == hf.RONDO
    theirs = OURS[name][0]
    with pytest.raises(UserError, match=rf"{theirs} .* needs logit_cap null, not 30\.0"):
        hf.choose(config, theirs)


def test_second_copies_of_tensors_are_left_alone(tmp_path: Path) -> None:
    """Mistral's folders have `consolidated.safetensors` beside what the index names."""
    theirs = their_model("mistral")
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    wanted = hf.read_folder(tmp_path / "one")[1]
    assert len([*(tmp_path / "many").glob("*.safetensors")]) > 2
    for name in ("one", "many"):
        save_file({"output.weight": torch.ones(2)}, tmp_path / name / "consolidated.safetensors")
        found = hf.read_folder(tmp_path / name)[1]
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], x) for key, x in wanted.items())
    (tmp_path / "many" / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(UserError, match="weight_map: expected names of files, got 1"):
        hf.read_folder(tmp_path / "many")


def test_what_has_no_counterpart_is_named(tmp_path: Path) -> None:
    model = decoder("qwen3")
    with pytest.raises(UserError, match="LlamaForCausalLM needs qk_norm False, not True"):
        hf.write_folder(tmp_path, model.config, model.state_dict(), architecture="LlamaForCausalLM")
    with pytest.raises(UserError, match=r"unknown 'Llama' .*LlamaForCausalLM"):
        hf.write_folder(tmp_path, model.config, model.state_dict(), architecture="Llama")
    for name in ("llama", "mamba2"):
        centred = dataclasses.replace(decoder(name).config, zero_centered_norms=True)
        assert hf.choose(centred) == hf.RONDO
        with pytest.raises(UserError, match=f"{OURS[name][0]} needs zero_centered_norms False"):
            hf.choose(centred, OURS[name][0])
    config = transformers.LlamaConfig(**GROUPED, vocab_size=VOCAB, hidden_size=DIM)
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
