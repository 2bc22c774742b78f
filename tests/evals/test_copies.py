"""Loss by copy: a model that copies has none from the second on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rondo.errors import UserError
from rondo.evals.copies import copy_losses, main
from rondo.evals.scoring import token_log_likelihoods
from rondo.models import Decoder, ModelConfig
from rondo.tests.evals.runs import write_run

pytestmark = pytest.mark.quick
WORDS = 50


class Copier:
    """Perfect induction: what followed the token at hand when it was last read follows again; a
    uniform guess where it was not. Hidden states are logits."""

    output_weight = torch.zeros(0)

    def __call__(self, ids: torch.Tensor, state: list[int] | None = None) -> Any:
        read, logits = [*(state or [])], torch.zeros(1, ids.shape[1], WORDS)
        for place, token in enumerate(ids[0].tolist()):
            before = [i for i, other in enumerate(read) if other == token]
            read.append(token)
            if before:
                logits[0, place, read[before[-1] + 1]] = 1e4
        return SimpleNamespace(hidden=logits, state=read)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def test_perfect_induction_has_no_loss_from_the_second_copy_on() -> None:
    model: Any = Copier()
    paragraph = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    first, *later = copy_losses(model, [49, 45], [*paragraph, 45], 11)
    assert first == pytest.approx(math.log(WORDS), rel=1e-6)
    assert later == [0.0] * 10


def test_losses_are_those_of_the_tokens() -> None:
    config = ModelConfig(vocab_size=WORDS, dim=32, num_layers=2, pattern=["attention"])
    model = Decoder(config, seed=1).eval()
    paragraph = [*range(7)]
    got = copy_losses(model, [49, 48], paragraph, 3)
    nats = -token_log_likelihoods(model, [49, 48, *paragraph * 3])[1:]
    wanted = [float(nats[i : i + 7].mean()) for i in (0, 7, 14)]
    assert got == pytest.approx(wanted, rel=1e-5)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "text.txt").write_text("A text that is short.")
    words = [str(tmp_path / "run"), "--copies=3", "--paragraphs=2", "--tokens=9"]
    words.append(f"--text={tmp_path / 'text.txt'}")
    assert main(words) == 0
    found = json.loads((tmp_path / "run/copies.json").read_text())["loss"]
    assert list(found) == ["random", "text"] and all(len(each) == 3 for each in found.values())
    assert f"{found['text'][2]:.4f}" in capsys.readouterr().out
    assert main(["--help"]) == 0
    with pytest.raises(UserError, match="copies: must be at least 1, got 0"):
        main([*words, "--copies=0"])
    with pytest.raises(UserError, match=r"text: .*text\.txt has no document of 99 tokens"):
        main([*words, "--tokens=99"])
