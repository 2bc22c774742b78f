"""The harness's questions, answered: generation against greedy decoding, local data, its `hf`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rondo.models import Decoder, ModelConfig
from rondo.models.generate import generate
from rondo.pretrain.data.tokenizer import ByteTokenizer

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from rondo.evals.adapter import HarnessModel
from rondo.evals.catalog import Catalog, Sources


def decoder(mixer: str = "gated_deltanet") -> Decoder:
    config = ModelConfig(vocab_size=257, dim=64, num_layers=2, pattern=[mixer])
    return Decoder(config, seed=3).eval()


def ask(kind: Any, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


@pytest.mark.parametrize("mixer", ["attention", "gated_deltanet"])
def test_texts_are_those_of_greedy_decoding_at_any_batch_size(mixer: str) -> None:
    model, words = decoder(mixer), ByteTokenizer()
    prompts = ["", "a", "b", "some", "more", "a longer one"]
    want = []
    for prompt in prompts:
        ids = words.encode(prompt) or [256]
        out = generate(model, torch.tensor([ids]), max_tokens=9, temperature=0.0, eod=256)
        want.append(words.decode(out[0, len(ids) :].tolist()))
    for size in (1, 2, 7):
        adapter = HarnessModel(model, words, size)
        options = {"until": [], "max_gen_toks": 9}
        asked = [ask("generate_until", p, options) for p in prompts]
        assert adapter.generate_until(asked, disable_tqdm=True) == want
    stop = next(c for c in want[5] if c != want[5][0])
    (text,) = HarnessModel(model, words).generate_until(
        [ask("generate_until", prompts[5], {"until": stop, "max_gen_toks": 9})], disable_tqdm=True
    )
    assert text == want[5].split(stop)[0] != want[5]


def test_an_empty_context_is_the_end_of_a_document() -> None:
    adapter = HarnessModel(decoder(), ByteTokenizer())
    (whole,) = adapter.loglikelihood_rolling([ask("x", "A text.")], disable_tqdm=True)
    ((score, _),) = adapter.loglikelihood([ask("x", "", "A text.")], disable_tqdm=True)
    assert score == pytest.approx(whole, abs=1e-4)
    # A space at the end of a context belongs to the continuation, as everywhere in the harness.
    pairs = [("A ", "text."), ("A", " text.")]
    (left, _), (right, _) = adapter.loglikelihood([ask("x", *p) for p in pairs], disable_tqdm=True)
    assert left == right < 0


def test_local_files_stand_in_for_the_hub(tmp_path: Path) -> None:
    rows = {
        "piqa": {"query": "Question: Cook?\n", "choices": ["Fire", "Ice"], "gold": 1},
        "arc_easy": {"query": "Question: Hot?", "choices": ["a", "b", "c"], "gold": 2},
        "lambada_openai": {"context": "It was a", "continuation": "sign"},
        "causative": {"sentence_good": "He sat.", "sentence_bad": "He sit."},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    catalog = Catalog(Sources(ByteTokenizer(), tmp_path))
    want = {
        "piqa": [("Question: Cook?\nAnswer:", " Fire"), ("Question: Cook?\nAnswer:", " Ice")],
        "arc_easy": [("Question: Hot?\nAnswer:", f" {c}") for c in "abc"],
        "lambada_openai": [("It was a", " sign")],
        "blimp_causative": [("", " He sat."), ("", " He sit.")],
    }
    for name, pairs in want.items():
        task = catalog.find(name)
        task.set_config("num_fewshot", 0)
        task.build_all_requests(rank=0, world_size=1)
        assert [instance.args for instance in task.instances] == pairs, name
        doc = next(iter(task.test_docs()))
        assert name != "piqa" or task.doc_to_target(doc) == 1
        assert name != "arc_easy" or task.doc_to_target(doc) == 2
