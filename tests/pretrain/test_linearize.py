"""`rondo import --linearize`: attention becomes gated linear attention with the same weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rondo.errors import UserError
from rondo.launch.cli import main
from rondo.models import Decoder, ModelConfig, load
from rondo.models.hf.linearize import linearize
from rondo.models.loading import find_checkpoint, read_tensors
from rondo.pretrain import interchange, load_recipe, train

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
VOCAB = 257


def llama(folder: Path, **changes: Any) -> Any:
    """A small Llama of bytes in a folder."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**{**sizes, **changes}, initializer_range=0.1)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def imported(folder: Path, pattern: str) -> Path:
    output = folder / "linear"
    words = [str(folder / "llama"), "--output", str(output), "--tokenizer", "bytes"]
    assert main(["import", *words, "--linearize", pattern]) == 0
    return output


def rows() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


def logits(model: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(rows()).hidden)


def test_weights_are_the_llamas_and_untouched_layers_give_what_they_gave(tmp_path: Path) -> None:
    theirs = llama(tmp_path / "llama")
    model = load(imported(tmp_path, "[attention, liger]"))
    assert [spec.mixer for spec in model.config.layers()] == ["attention", "liger"] * 2
    assert model.config.pattern == ["attention", "liger"]
    assert model.config.mixers["liger"]["window"] == 64
    weights = theirs.state_dict()
    for layer in range(4):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            there = weights[f"model.layers.{layer}.self_attn.{name}.weight"]
            assert torch.equal(model.state_dict()[f"blocks.{layer}.mixer.{name}.weight"], there)
    seen: list[torch.Tensor] = []
    theirs.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.blocks["1"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        expected = theirs(rows()).logits
    found = logits(model)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)  # layer 0 is as it was
    assert (found - expected).abs().max() > 0.01  # layer 1 is not


def test_liger_is_its_equations(tmp_path: Path) -> None:
    """One layer of grouped heads, by a loop over time, beside a window of 3."""
    options = {"num_heads": 4, "num_kv_heads": 2, "qk_norm": False}
    config = ModelConfig(vocab_size=VOCAB, dim=32, num_layers=1, pattern=["attention"], ffn="none")
    config.mixers = {"attention": options}
    config = linearize(config, ["liger"])
    config.mixers["liger"]["window"] = 3
    model = Decoder(config, seed=1).double()
    mixer, x = model.blocks["0"].mixer, torch.randn(1, 9, 32, dtype=torch.float64)
    window = dataclasses.replace(config, pattern=["attention"])
    window.mixers = {"attention": {**options, "window": 3}}
    local = Decoder(window, seed=1).double().blocks["0"].mixer
    from rondo.models import SequenceContext

    ctx = SequenceContext(torch.arange(9)[None])
    with torch.no_grad():
        q, k, v = (
            getattr(mixer, f"{n}_proj")(x)[0].unflatten(-1, (-1, 8)).repeat_interleave(r, 1)
            for n, r in (("q", 1), ("k", 2), ("v", 2))
        )
        found = torch.zeros(9, 4, 8, dtype=torch.float64)
        for head in range(4):
            state = torch.zeros(8, 8, dtype=torch.float64)
            for t in range(9):
                gate = k[t, head].sigmoid() ** (1 / 16)
                key, query = k[t, head].softmax(-1), q[t, head].softmax(-1)
                state = gate[:, None] * state + key[:, None] * v[t, head]
                found[t, head] = query @ state
        recurrent = mixer.o_proj(found.flatten(1))
        expected = 0.5 * recurrent + 0.5 * local(x, ctx)[0][0]
        torch.testing.assert_close(mixer(x, ctx)[0][0], expected)


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("Llama", {}),
        ("Qwen2", {}),
        ("Mistral", {"head_dim": 16, "sliding_window": 9}),
        ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    ],
)
def test_window_alone_is_the_model_that_was_read(
    tmp_path: Path, kind: str, others: dict[str, Any]
) -> None:
    """Grouped heads; biases with Qwen2, windows with Mistral, norms of q and k with Qwen3."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    described = getattr(transformers, f"{kind}Config")(**sizes, **others)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(described).eval()
    with torch.no_grad():
        for param in theirs.parameters():
            param += 0.1 * torch.randn_like(param)
    theirs.save_pretrained(tmp_path)
    from rondo.models import hf

    config, tensors = hf.read_folder(tmp_path)
    config = linearize(config, ["liger"])
    alone = {"recurrent_share": 0.0, "window_share": 1.0, "window": others.get("sliding_window")}
    for options in config.mixers.values():
        options |= alone
    model = Decoder(config)
    model.load_state_dict(tensors)
    assert {spec.mixer for spec in config.layers()} == {"liger"}
    with torch.no_grad():
        expected = theirs(rows()).logits
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [[], ["--model.lora_rank=4"]], ids=["all", "lora"])
def test_training_goes_on_from_it(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss falls; with adapters nothing but these has changed, a run that was cut in two ends
    in the same bits, and an export has them merged."""
    llama(tmp_path / "llama", num_hidden_layers=2)
    monkeypatch.setattr(interchange, "SHARD_BYTES", 1 << 15)
    start = imported(tmp_path, "[liger, attention]")
    assert len([*(start / "model").glob("*.safetensors")]) > 2
    text = tmp_path / "text.txt"
    text.write_text("One fish swims, two fish swim, and no fish walks.\n\n" * 200)

    def run(name: str, *more: str) -> Path:
        words = [f"--output_dir={tmp_path}/runs", f"--data.folder={tmp_path}/data"]
        words += [f"--name={name}", "--steps=12", "--optimizer.lr=1e-2", "--precision=float32"]
        words += ["--data.sequence_length=48", "--data.global_batch_size=4", "--evals.batches=0"]
        words += ["--data.micro_batch_size=4", f"--data.sources=[{{path: {text}}}]"]
        words += ["--logging.tensorboard=false", "--schedule.name=constant", *options, *more]
        assert train(load_recipe(start / "recipe.yaml", words)) == 0
        return find_checkpoint(tmp_path / "runs" / name)

    end = run("whole")
    log = (end.parents[1] / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in log]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3
    if not options:
        return
    before, after = read_tensors(start / "model"), read_tensors(end / "model")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(".lora_" in name for name in after.keys() - before.keys())
    assert all(".lora_" in name for name in read_tensors(end / "optimizer"))
    run("cut", "--steps=5")
    again = run("cut")
    for part in ("model", "optimizer"):
        mine, other = read_tensors(again / part), read_tensors(end / part)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    exported = tmp_path / "exported"
    assert main(["export", str(end), "--output", str(exported)]) == 0
    from rondo.models import hf

    config, tensors = hf.read_folder(exported)
    plain = Decoder(config)
    plain.load_state_dict(tensors)
    torch.testing.assert_close(logits(plain), logits(load(end)), rtol=1e-4, atol=1e-4)


@pytest.mark.quick
def test_what_cannot_be_linear_is_named() -> None:
    config = ModelConfig(vocab_size=9, num_layers=2, pattern=["mamba2", "attention"])
    with pytest.raises(UserError, match="layer 0 is mamba2, and only attention can"):
        linearize(config, ["liger"])
    with pytest.raises(UserError, match=r"expected liger or attention.*, got 'gla'"):
        linearize(config, ["gla"])
    kept = linearize(config, ["attention", "liger"])
    assert kept.pattern == ["mamba2", "liger"]
