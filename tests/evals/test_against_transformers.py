"""The same weights in transformers' Llama and in a Decoder: the same log-likelihoods."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rondo.evals.scoring import continuations
from rondo.models import Decoder, ModelConfig
from rondo.pretrain.data import load_tokenizer

transformers = pytest.importorskip("transformers")
NAMES = {
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn": "mixer",
    "mlp": "ffn",
    "embed_tokens": "embedding",
    "lm_head": "head",
    "layers": "blocks",
}


def llama_and_decoder(vocabulary: int) -> tuple[Any, Decoder]:
    """The same random weights as transformers' model and as ours."""
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            initializer_range=0.2,
        )
    ).eval()
    options = {"num_heads": 4, "num_kv_heads": 2, "qk_norm": False}
    config = ModelConfig(
        vocab_size=vocabulary,
        dim=32,
        num_layers=2,
        pattern=["attention"],
        ffn_dim=48,
        mixers={"attention": options},
    )
    decoder = Decoder(config, seed=0).eval()
    weights = {}
    for name, value in llama.state_dict().items():
        parts = [NAMES.get(part, part) for part in name.removeprefix("model.").split(".")]
        weights[".".join(parts)] = value
    decoder.load_state_dict(weights)
    return llama, decoder


def test_log_likelihoods_are_those_of_llama() -> None:
    llama, decoder = llama_and_decoder(50)
    draw = random.Random(0)
    pairs = []
    for size in (1, 6, 6, 13, 30):
        context = draw.choices(range(50), k=size)
        pairs += [(context, draw.choices(range(50), k=n)) for n in (1, 2, 5)]
    want = []
    with torch.no_grad():
        for context, continuation in pairs:
            logits = llama(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
            target = torch.tensor(continuation)[:, None]
            want.append(float(logits.log_softmax(-1).gather(1, target).sum()))
    assert max(want) - min(want) > 1  # weights large enough that scores differ
    for batch_size in (1, 7, 32):
        found = [score.log_likelihood for score in continuations(decoder, pairs, batch_size)]
        assert found == pytest.approx(want, abs=1e-4)


ROWS = {
    "piqa": [
        {"query": f"Question: How to {verb}?\n", "choices": [f"Use {a}.", f"{b} it is."], "gold": 0}
        for verb, a, b in (
            ("cook", "fire", "Ice"),
            ("sew", "a needle", "Salt"),
            ("dig", "it", "No"),
        )
    ],
    "arc_easy": [
        {"query": f"Question: Is {a} hot?", "choices": ["yes", "no", "at times", a], "gold": 1}
        for a in ("ice", "a sun", "the inside of the earth")
    ],
    "lambada_openai": [
        {"context": f"They saw {a} and then they lost", "continuation": "it"}
        for a in ("a sign", "the sun over the hills")
    ],
    "causative": [
        {"sentence_good": f"{a} sat down.", "sentence_bad": f"{a} sit to the ground."}
        for a in ("He", "She and I", "Nobody")
    ],
}


def tokenizers(folder: Path) -> tuple[Any, Any]:
    """Byte-level BPE in transformers and in the project."""
    library = pytest.importorskip("tokenizers")
    words = library.Tokenizer(library.models.BPE())
    words.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )
    words.train_from_iterator([json.dumps(ROWS)], trainer)
    words.save(str(folder / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    return theirs, load_tokenizer(folder / "tokenizer.json")


def test_the_harness_finds_what_it_finds_with_its_own_model(tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")  # the harness's `hf` model needs it
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from rondo.evals.adapter import HarnessModel
    from rondo.evals.catalog import Catalog, Sources

    for name, rows in ROWS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    theirs, ours = tokenizers(tmp_path)
    llama, decoder = llama_and_decoder(ours.vocab_size)
    catalog = Catalog(Sources(ours, tmp_path))
    manager = TaskManager(include_defaults=False)

    def answers(model: Any) -> tuple[dict[str, Any], list[float]]:
        names = ("piqa", "arc_easy", "lambada_openai", "blimp_causative")
        tasks = manager.load([catalog.find(name) for name in names])
        for task in tasks["tasks"].values():
            task.set_config("num_fewshot", 0)
        found = lm_eval.evaluate(model, tasks, bootstrap_iters=0)
        rows = [row for name in names for row in found["samples"][name]]
        return found["results"], [r[0][0] for row in rows for r in row["resps"]]

    results, want = answers(HFLM(pretrained=llama, tokenizer=theirs, batch_size=1))
    assert len(want) == 3 * 2 + 3 * 4 + 2 + 3 * 2
    for size in (1, 7, 32):
        found, values = answers(HarnessModel(decoder, ours, size))
        assert values == pytest.approx(want, abs=1e-4)
        for name, metrics in results.items():
            for metric in metrics:
                if metric.startswith("acc") and "stderr" not in metric:
                    assert found[name][metric] == metrics[metric]


def test_a_checkpoint_against_its_export(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from rondo.evals.against_hf import AgainstConfig, compare
    from rondo.pretrain.interchange import ExportConfig, export_checkpoint
    from rondo.tests.evals.runs import write_run

    _, words = tokenizers(tmp_path)
    checkpoint = write_run(tmp_path / "run", mixer="attention", tokenizer=words, qk_norm=False)
    for name, rows in ROWS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    exported = export_checkpoint(ExportConfig(str(checkpoint), str(tmp_path / "exported")))
    config = AgainstConfig(str(checkpoint), str(exported), str(tmp_path), "piqa", double=True)
    config.batch_sizes = "1,2"
    (row,) = compare(config).values()
    assert max(row[key] for key in ("batch 1", "batch 2", "ours", "theirs")) < 1e-4
    assert row["accuracies"] == 0 and row["size"] > 50 and row["requests"] == 2 * len(ROWS["piqa"])
