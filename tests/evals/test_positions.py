"""Loss and states by position are the model's own, token by token."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rondo.errors import UserError
from rondo.evals.first_token import kept
from rondo.evals.first_token import summary as first_token_summary
from rondo.evals.positions import (
    _effective_rank,
    curves,
    degenerate,
    length_of,
    of_first_token,
    rows,
    summary,
)
from rondo.evals.scoring import token_log_likelihoods
from rondo.evals.state_heads import StateHeads
from rondo.models import Decoder, ModelConfig
from rondo.pretrain.data import load_tokenizer

pytestmark = pytest.mark.quick
LENGTH = 37
RETNET = {"num_heads": 4, "rope_theta": 1e30}  # only one pair of channels rotates
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
    measures = ("state_norm", "largest_norm", "largest_variance")
    names = {f"{n}/{i}" for n in measures for i in ("00", "01")}
    assert got.keys() == names | {"loss", "effective_rank/00"}
    for end in ENDS:
        states = decoder(torch.tensor(found)[:, :end]).state.layers
        matrix = states[0]["recurrent"]
        norms = {"00": matrix.norm(dim=(2, 3)), "01": states[1]["recurrent"].norm(dim=(1, 3))}
        for layer, norm in norms.items():
            assert got[f"state_norm/{layer}"][end] == pytest.approx(float(norm.mean()), rel=1e-4)
            largest = float(norm.amax(1).mean())
            assert got[f"largest_norm/{layer}"][end] == pytest.approx(largest, rel=1e-4)
        variance = matrix.flatten(2).var(-1, correction=0).amax(1).mean()
        assert got["largest_variance/00"][end] == pytest.approx(float(variance), rel=1e-4)
        rank = float(_effective_rank(matrix).mean())
        assert got["effective_rank/00"][end] == pytest.approx(rank, rel=1e-3)
        assert rank <= min(end, matrix.shape[-2]) + 1e-6


@torch.no_grad()
def test_heads_with_the_largest_and_the_smallest_states() -> None:
    decoder, draw, length = model(), random.Random(0), 300
    long = [draw.choices(range(40), k=length + 1) for _ in range(3)]
    heads = StateHeads()
    curves(decoder, long, batch_size=2, heads=heads)
    got = heads.by_tokens()
    assert got.keys() == {f"{m}/{i}" for m in ("norm", "variance") for i in ("00", "01")}
    assert [*map(int, got["norm/00"])] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]
    norms = {}
    for end in (128, 256, 300):
        state = decoder(torch.tensor(long)[:, :end]).state.layers[0]["recurrent"]
        for name, values in (
            ("norm", state.flatten(2).norm(dim=-1).mean(0)),
            ("variance", state.flatten(2).var(-1, correction=0).mean(0)),
        ):
            cell = got[f"{name}/00"][str(end)]
            assert cell["largest"] == pytest.approx(float(values.max()), rel=1e-4)
            assert cell["smallest"] == pytest.approx(float(values.min()), rel=1e-4)
            assert cell["largest_head"] == int(values.argmax())
            assert cell["smallest_head"] == int(values.argmin())
            norms[name, end] = values
    found = heads.extremes(None)
    assert found.keys() == {"norm", "variance"}
    assert found["norm"]["largest"]["value"] == max(
        cell["largest"] for layer in ("00", "01") for cell in got[f"norm/{layer}"].values()
    )


def test_extremes_name_layer_and_head() -> None:
    heads = StateHeads()
    for at, size in ((128, [1.0, 3.0]), (256, [2.0, 3.0]), (384, [7.0, 6.0])):
        heads.note("02", at, torch.tensor(size).view(1, 2, 1, 1))
    heads.texts = 1
    found = heads.extremes(256)
    assert found["norm"] == {
        "largest": {"layer": 2, "head": 0, "at": 384, "value": 7.0},
        "smallest": {"layer": 2, "head": 0, "at": 128, "value": 1.0},
    }
    assert found["growth"] == {"layer": 2, "head": 0, "value": 3.5}  # head 1 has grown to twice
    assert StateHeads().extremes(256) == {}


def test_losses_by_buckets() -> None:
    decoder, draw, length = model(), random.Random(0), 1100
    long = [draw.choices(range(40), k=length + 1) for _ in range(2)]
    got = curves(decoder, long)["loss_512"]
    nats = -torch.stack([token_log_likelihoods(decoder, row) for row in long]).mean(0)
    assert [*got] == [512, 1024]
    for end, value in got.items():
        assert value == pytest.approx(float(nats[end - 512 : end].mean()), abs=2e-6)


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
    buckets = {512: 2.0, 1024: 1.5, 1536: 1.75, 2048: 1.6}
    assert summary({"loss": loss, "loss_512": buckets}, 1500)["collapse_512"] == 0.25
    assert "collapse_512" not in summary({"loss": loss, "loss_512": buckets}, 400)


def test_texts_follow_each_other(tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "text.txt", load_tokenizer("bytes")
    file.write_text("abcdefghij")
    assert rows(str(file), tokenizer, 4, 9) == [[256, *b"abcd"], [*b"defgh"]]
    assert len(rows(str(file), tokenizer, 4, 1)) == 1
    with pytest.raises(UserError, match=r"positions_11: .*text.txt has only 11 tokens"):
        rows(str(file), tokenizer, 11, 1)
    assert length_of("positions_2048") == 2048 == length_of("newlines_2048")
    assert length_of("parity_4") is None


def test_degenerate_texts_are_one_token_again_and_again() -> None:
    tokenizer = load_tokenizer("bytes")
    assert degenerate("newlines", tokenizer, 4, 9) == [[256, *b"\n\n\n\n"]]
    assert degenerate("capitals", tokenizer, 3, 2) == [[256, *b"AAA"], [256, *b"BBB"]]
    assert len(degenerate("capitals", tokenizer, 3, 99)) == 26
    words: Any = SimpleNamespace(eod=0, encode=lambda text: [1 for _ in text.split()])
    with pytest.raises(UserError, match="newlines_4: the tokenizer has no token"):
        degenerate("newlines", words, 4, 1)


@torch.no_grad()
def test_a_state_that_reads_one_token_again_and_again() -> None:
    # Where no key rotates every write is one matrix W, and S_t = W (1 - g^t) / (1 - g).
    config = ModelConfig(
        vocab_size=257, dim=32, num_layers=1, pattern=["retnet"], mixers={"retnet": RETNET}
    )
    decoder, text = Decoder(config, seed=1).eval(), [10] * (LENGTH + 1)
    keys = decoder.get_parameter("blocks.0.mixer.k_proj.weight").view(4, 8, 32)
    keys[:, [0, 1, 4]] = 0  # the one pair that still rotates
    write = decoder(torch.tensor([text[:1]])).state.layers[0]["recurrent"]
    norms = write.flatten(2).norm(dim=-1)[0].double()
    decay = 1 - torch.exp2(-5.0 - torch.arange(4).double())
    got = curves(decoder, [text])
    for end in ENDS:
        sums = norms * (1 - decay**end) / (1 - decay)
        assert got["largest_norm/00"][end] == pytest.approx(float(sums.max()), rel=1e-4)
        assert got["state_norm/00"][end] == pytest.approx(float(sums.mean()), rel=1e-4)
        assert got["effective_rank/00"][end] == pytest.approx(1.0, abs=1e-3)


@torch.no_grad()
def test_what_is_left_of_the_first_token() -> None:
    pattern = ["retnet", "attention", "gated_deltanet", "slstm", "retnet"]
    config = ModelConfig(
        vocab_size=40, dim=32, num_layers=5, pattern=pattern, mixers={"retnet": RETNET}
    )
    decoder, text = Decoder(config, seed=1).eval(), texts(1)[0][:LENGTH]
    got = kept(decoder, text, ENDS)
    assert [*got] == ["00", "02", "04"]
    decay = 1 - torch.exp2(-5.0 - torch.arange(4).double())
    for end in ENDS:
        for layer in ("00", "04"):
            assert got[layer][end] == pytest.approx((decay ** (end - 1)).tolist(), rel=1e-3)
    # A delta rule multiplies by matrices: twice the first state is what is left of it more.
    first = decoder(torch.tensor([text[:1]])).state
    twice = {**first.layers[2], "recurrent": 2 * first.layers[2]["recurrent"]}
    other = first._replace(layers=[*first.layers[:2], twice, *first.layers[3:]])
    for end in ENDS[1:]:
        rest = torch.tensor([text[1:end]])
        one, two = (decoder(rest, state=s).state.layers[2]["recurrent"] for s in (first, other))
        left = (two - one).flatten(2).norm(dim=-1) / first.layers[2]["recurrent"].flatten(2).norm(
            dim=-1
        )
        assert got["02"][end] == pytest.approx(left[0].tolist(), rel=1e-2, abs=1e-5)
    shown, more, most = of_first_token(decoder, [*text, 0], 21)
    assert shown["first_token/00"][32] == pytest.approx(float(decay.max()) ** 31, rel=1e-3)
    keeping = sum(
        share > 0.5 for shares in kept(decoder, text, [21]).values() for share in shares[21]
    )
    assert more == {"unforgetting_heads": keeping} and keeping > 0
    layer, head = most["first_token"]["layer"], most["first_token"]["head"]
    assert layer in (0, 4) and head == int(decay.argmax())
    assert most["first_token"]["value"] == pytest.approx(float(decay.max()) ** 20, rel=1e-3)
    assert of_first_token(decoder, [*text, 0], None)[1:] == ({}, {})


def test_heads_that_keep_more_than_a_half_have_not_learnt_to_forget() -> None:
    shares = {"00": {8: [0.6, 0.4], 16: [0.51, 0.1]}, "03": {8: [0.9, 0.9], 16: [0.2, 0.7]}}
    assert first_token_summary(shares, 8) == {"unforgetting_heads": 3.0}
    assert first_token_summary(shares, 16) == {"unforgetting_heads": 2.0}
    assert first_token_summary(shares, 32) == first_token_summary(shares, None) == {}
