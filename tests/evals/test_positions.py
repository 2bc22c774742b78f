"""Loss and states by position are the model's own, token by token."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from rondo.errors import UserError
from rondo.evals.positions import _effective_rank, curves, length_of, rows, summary
from rondo.evals.scoring import token_log_likelihoods
from rondo.models import Decoder, ModelConfig
from rondo.pretrain.data import load_tokenizer

pytestmark = pytest.mark.quick
LENGTH = 37
ENDS = (1, 2, 4, 8, 16, 32, LENGTH)


def model() -> Decoder:
    pattern = ["gated_deltanet", "slstm", "attention"]
    return Decoder(ModelConfig(vocab_size=40, dim=32, num_layers=3, pattern=pattern), seed=1).eval()


def texts(count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [draw.choices(range(40), k=LENGTH + 1) for _ in range(count)]


def test_losses_are_those_of_the_tokens_of_a_bin() -> None:
    decoder, found = model(), texts(3)
    got = curves(decoder, found, batch_size=2)["loss"]
    nats = -torch.stack([token_log_likelihoods(decoder, row) for row in found]).mean(0)
    assert list(got) == [1, 2, 4, 8, 16, 32]
    for start, value in got.items():
        # The first has one token before it.
        want = nats[start - 1 : min(2 * start, LENGTH + 1) - 1].mean()
        assert value == pytest.approx(float(want), abs=2e-6)
    assert summary({"loss": got, "x": {LENGTH: 0}}, None) == {
        "loss": pytest.approx(float(nats.mean()), abs=2e-6)
    }


@torch.no_grad()
def test_states_are_those_after_so_many_tokens() -> None:
    decoder, found = model(), texts(3)
    got = curves(decoder, found, batch_size=2)
    names = {f"{n}/{i}" for n in ("state_norm", "largest_norm") for i in ("00", "01")}
    assert got.keys() == names | {"loss", "effective_rank/00"}
    for end in ENDS:
        states = decoder(torch.tensor(found)[:, :end]).state.layers
        matrix = states[0]["recurrent"]
        norms = {"00": matrix.norm(dim=(2, 3)), "01": states[1]["recurrent"].norm(dim=(1, 3))}
        for layer, norm in norms.items():
            assert got[f"state_norm/{layer}"][end] == pytest.approx(float(norm.mean()), rel=1e-4)
            largest = float(norm.amax(1).mean())
            assert got[f"largest_norm/{layer}"][end] == pytest.approx(largest, rel=1e-4)
        rank = float(_effective_rank(matrix).mean())
        assert got["effective_rank/00"][end] == pytest.approx(rank, rel=1e-3)
        assert rank <= min(end, matrix.shape[-2]) + 1e-6


def test_effective_rank() -> None:
    assert float(_effective_rank(torch.eye(5))) == pytest.approx(5)
    assert float(_effective_rank(torch.ones(4, 3))) == pytest.approx(1)
    assert float(_effective_rank(torch.zeros(4, 3))) == 0
    shares = [0.75, 0.25]
    want = math.exp(-sum(p * math.log(p) for p in shares))
    assert float(_effective_rank(torch.diag(torch.tensor([3.0, -1.0])))) == pytest.approx(want)


def test_collapse_is_what_comes_beyond_training() -> None:
    loss = {1: 5.0, 2: 3.0, 4: 2.0, 8: 1.5, 16: 2.25, 32: 1.75}
    norms = {1: 1.0, 4: 2.0, 16: 3.0, 32: 12.0}
    found = summary({"loss": loss, "largest_norm/00": norms}, 16)
    assert found["collapse"] == pytest.approx(2.25 - 1.5)
    assert found["state_growth"] == pytest.approx(12 / 3)
    assert summary({"loss": loss, "largest_norm/00": norms}, 64).keys() == {"loss"}


def test_texts_follow_each_other(tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "text.txt", load_tokenizer("bytes")
    file.write_text("abcdefghij")
    assert rows(str(file), tokenizer, 4, 9) == [[256, *b"abcd"], [*b"defgh"]]
    assert len(rows(str(file), tokenizer, 4, 1)) == 1
    with pytest.raises(UserError, match=r"positions_11: .*text.txt has only 11 tokens"):
        rows(str(file), tokenizer, 11, 1)
    assert length_of("positions_2048") == 2048 and length_of("parity_4") is None
