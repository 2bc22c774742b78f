"""Impossible layouts are refused while the recipe is read, all problems at once."""

from __future__ import annotations

import pytest

from rondo.pretrain import load_recipe, validate_layout
from rondo.pretrain.typed import RecipeError

pytestmark = pytest.mark.quick
MOE = "--model.ffns={moe: {num_experts: 6}}"
EXPERT_DIM = "--model.ffns.moe.expert_dim=9"
FEW_HEADS = "--model.mixers={attention: {num_heads: 4, num_kv_heads: 2}}"


def problems(ranks: int | None, *options: str) -> str:
    pattern = "attention+moe" if MOE in options else "attention"
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny", [f"--model.pattern=[{pattern}]", *options], world_size=ranks)
    return str(caught.value)


@pytest.mark.parametrize(
    ("ranks", "options", "words"),
    [
        (8, ["--parallel.tp=3"], ["parallel.tp", "3", "8 ranks"]),
        (8, ["--parallel.tp=0"], ["parallel.tp", "at least 1", "got 0"]),
        (8, ["--parallel.pp=2", "--parallel.dp_shard=2"], ["parallel.dp_shard", "= 4", "8"]),
        (4, ["--parallel.tp=4", FEW_HEADS], ["parallel.tp", "4", "num_kv_heads", "2"]),
        (2, ["--parallel.tp=2", "--model.ffn_dim=63"], ["parallel.tp", "model.ffn_dim", "63"]),
        (4, ["--parallel.tp=4", "--model.vocab_size=3"], ["parallel.tp", "model.vocab_size 3"]),
        (3, ["--parallel.cp=3"], ["data.sequence_length", "128", "cp 3", "129"]),
        (8, ["--parallel.pp=8", "--model.num_layers=7"], ["parallel.pp", "8 stages", "7 layers"]),
        (
            2,
            ["--parallel.pp=2", "--parallel.pipeline_schedule=interleaved", "--model.num_layers=3"],
            ["parallel.pp", "4 stages", "3 layers"],
        ),
        (
            4,
            ["--parallel.pp=4", "--model.num_layers=8"],
            ["parallel.pipeline_schedule", "at least 4", "got 2", "micro_batch_size"],
        ),
        (2, ["--parallel.tp=2", "--compile=true"], ["compile", "parallel.tp"]),
        (
            2,
            [
                "--parallel.pp=2",
                "--parallel.pipeline_schedule=zero_bubble",
                "--parallel.activation_checkpointing=selective",
            ],
            ["parallel.activation_checkpointing", "selective", "zero_bubble"],
        ),
        (4, [MOE, "--parallel.ep=3"], ["parallel.ep", "3", "dp_shard x cp = 4"]),
        (8, [MOE, "--parallel.ep=8"], ["parallel.ep", "8", "6 experts", "num_experts"]),
        (4, [MOE, "--parallel.ep=0"], ["parallel.ep", "at least 1", "got 0"]),
        (4, [MOE, "--parallel.ep=2", "--model.dim=63"], ["parallel.ep", "model.dim 63"]),
        (2, ["--parallel.ep=2"], ["parallel.ep", "no experts", "model.pattern"]),
        (2, [MOE, "--parallel.ep=2", "--compile=true"], ["compile", "parallel.ep"]),
        (2, [MOE, "--parallel.tp=2", EXPERT_DIM], ["parallel.tp", "ffns.moe.expert_dim", "9"]),
        (
            2,
            ["--parallel.pp=2", "--parallel.pipeline_schedule=zero_buble"],
            ["pipeline_schedule", "did you mean zero_bubble"],
        ),
    ],
)
def test_the_message_names_key_and_numbers(
    ranks: int, options: list[str], words: list[str]
) -> None:
    text = problems(ranks, *options)
    for word in words:
        assert word in text, text


def test_all_problems_come_at_once() -> None:
    text = problems(8, "--parallel.tp=4", "--parallel.cp=2", FEW_HEADS, "--data.sequence_length=12")
    assert "num_kv_heads" in text and "data.sequence_length" in text
    wrong = ["--parallel.tp=3", "--parallel.pp=7", "--model.num_layers=6"]
    text = problems(8, *wrong, "--data.sequence_length=64", FEW_HEADS)
    for words in ("does not divide 8 ranks", "data.sequence_length", "7 stages", "num_kv_heads"):
        assert words in text, text


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (8, ["--parallel.pp=2", "--parallel.tp=2", "--parallel.cp=2"]),
        (4, ["--parallel.dp_replicate=2", "--parallel.tp=2"]),
        (None, ["--parallel.pp=2", "--parallel.pipeline_schedule=zero_bubble"]),
        (2, [MOE, "--parallel.cp=2", "--model.ffns.moe.capacity_factor=1.0"]),
    ],
)
def test_what_fits_is_accepted(ranks: int | None, options: list[str]) -> None:
    load_recipe("tiny", ["--model.pattern=[attention]", FEW_HEADS, *options], world_size=ranks)


def test_experts_over_ranks_need_a_torch_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_layout, "missing_torch", lambda: "needs torch 2.13 or newer")
    assert "parallel.ep: needs torch 2.13" in problems(2, MOE, "--parallel.ep=2")
    load_recipe("tiny", ["--model.pattern=[attention+moe]", MOE], world_size=2)
