"""The comparison of memories on recall: its answers, and what its variants leave out."""

from __future__ import annotations

import pytest
import torch

from rondo.errors import UserError
from rondo.evals.memory_recall import VARIANTS, MemoryRecallConfig, Recall, compare, draw, main

pytestmark = pytest.mark.quick
CONFIG = MemoryRecallConfig(steps=2, seeds=1, tokens=12, recent=5)


def test_answers_are_the_newest_values_of_keys() -> None:
    batch = draw(30, CONFIG, torch.Generator().manual_seed(0))
    for row in zip(*(x.tolist() for x in batch), strict=True):
        held: dict[int, int] = {}
        for t, (key, value, asked, answer) in enumerate(zip(*row, strict=True)):
            held[key] = value
            assert held[asked] == answer
            assert asked in row[0][max(0, t - 4) : t + 1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_what_they_say(variant: str) -> None:
    model = Recall(variant, CONFIG, 0)
    x = torch.randn(1, 6, 48, generator=torch.Generator().manual_seed(1))
    _, momentum, decay = model.memory.gates(x)
    assert (momentum.exp().max().item() < 1e-9) == (variant == "no_momentum")
    assert (decay.abs().max().item() < 1e-9) == (variant == "no_forgetting")
    assert len(model.memory.memory.shapes) == (1 if variant == "linear" else 2)


def test_a_table_of_short_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(MemoryRecallConfig("linear,no_momentum", 2, 2, 6, 3))
    assert [len(shares) for shares in found.values()] == [2, 2]
    assert f"{found['linear'][1]:.3f}" in capsys.readouterr().out


def test_what_is_unknown_is_said() -> None:
    with pytest.raises(UserError, match="variants: unknown 'deep'"):
        main(["--variants", "deep"])
    with pytest.raises(UserError, match="steps: must be at least 1, got 0"):
        main(["--steps", "0"])
