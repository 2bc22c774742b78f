"""The harness's own model for transformers runs exported models of any kind, as ours does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rondo.evals.adapter import HarnessModel
from rondo.models import load
from rondo.pretrain.data import load_tokenizer
from rondo.pretrain.interchange import ExportConfig, export_checkpoint
from rondo.tests.evals.runs import write_run

pytest.importorskip("accelerate")  # the harness's `hf` model needs it
lm_eval = pytest.importorskip("lm_eval")
TEXTS = [
    ("The sun", " is up"),
    ("", "a text of its own"),
    ("She said that", " no"),
    ("x " * 30, "y"),
]
PROMPTS = ["The sun rose and", "Once", "Two cats, of which one was black, and"]


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


@pytest.mark.parametrize("mixer", ["gla", "mamba2"])
def test_scores_and_texts_are_ours(mixer: str, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    import rondo.models.hf.modeling  # noqa: F401  (registers it)

    checkpoint = write_run(tmp_path / "run", mixer=mixer)
    config = ExportConfig(str(checkpoint), str(tmp_path / "exported"), architecture="auto")
    folder = str(export_checkpoint(config))
    theirs = HFLM(pretrained=folder, batch_size=2, dtype="float32", device="cpu")
    assert type(theirs.model).__name__ == "RondoForCausalLM"
    ours = HarnessModel(load(checkpoint), load_tokenizer(checkpoint / "tokenizer"), 2)
    scores = requests("loglikelihood", TEXTS)
    want, found = (model.loglikelihood(scores) for model in (ours, theirs))
    assert [score for score, _ in found] == pytest.approx([s for s, _ in want], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in want]
    whole = requests("loglikelihood_rolling", [("One text, and nothing before it.",)])
    assert theirs.loglikelihood_rolling(whole) == pytest.approx(
        ours.loglikelihood_rolling(whole), abs=1e-4
    )
    options = {"until": ["\x00never"], "max_gen_toks": 12}
    texts = requests("generate_until", [(prompt, options) for prompt in PROMPTS])
    assert theirs.generate_until(texts) == ours.generate_until(texts)
