"""Every registered mixer passes the conformance suite; so does one registered here."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.models import MIXERS, ModelConfig
from rondo.models.mixer import SequenceContext, State
from rondo.models.mixers.rnn import RNNOptions
from rondo.tests.mixer_suite import CHECKS, Case
from rondo.tests.toys import Toy

SLOWER = {"factor": 4.0, "original_max_position_embeddings": 60}
VARIANTS = [
    Case("attention", {"num_heads": 4, "num_kv_heads": 2, "window": 9, "rope": False}),
    Case("attention", {"num_heads": 2, "qk_norm": False, "qkv_bias": True, "rope_scaling": SLOWER}),
    Case("attention", {"num_heads": 4, "num_kv_heads": 2, "window": 9, "persistent_tokens": 3}),
    Case("mamba2", {"head_dim": 8, "state_dim": 8, "num_groups": 2}),
    Case("deltanet", {"head_dim": 8, "negative_eigenvalues": True, "output_gate": True}),
    Case("gated_deltanet", {"head_dim": 8, "negative_eigenvalues": True, "output_gate": False}),
    Case("titans_memory", {"head_dim": 16, "depth": 1, "chunk_size": 5}),
    Case("titans_mac", {"head_dim": 16, "segment_size": 10, "chunk_size": 5, "depth": 1}),
    Case("titans_mag", {"head_dim": 16, "window": None, "persistent_tokens": 0, "depth": 3}),
    Case("slstm", {"num_heads": 2, "output_projection": False}),
    Case("lstm", {"num_heads": 1}),
    Case("liger", {"num_heads": 4, "num_kv_heads": 2, "window": 9, "output_gate": True}),
    Case(
        "lact",
        {
            "num_fast_heads": 2,
            "chunk_size": 20,
            "window": 7,
            "update": "gradient",
            "momentum": False,
            "qk_norm": False,
            "expansion": 1.5,
        },
    ),
]
SMALL = {
    "attention": {"num_heads": 2},
    "mamba2": {"head_dim": 16, "state_dim": 8},
    "retnet": {"num_heads": 2},
    "hgrn2": {"head_dim": 8},
    "deltanet": {"head_dim": 16},
    "titans_memory": {"head_dim": 8},
    "titans_mac": {"head_dim": 8, "segment_size": 48, "persistent_tokens": 3},
    "titans_mag": {"head_dim": 8, "window": 20, "persistent_tokens": 3},
    "liger": {"num_heads": 2, "window": 20, "qk_norm": False},
    "lact": {"num_heads": 2, "num_fast_heads": 2, "chunk_size": 32, "init_rank": 4},
}
CASES = [Case(name, SMALL.get(name, {})) for name in MIXERS] + VARIANTS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_mixer(case: Case, check) -> None:
    check(case)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_new_mixer_needs_no_other_edit(check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXERS, "toy", Toy)
    check(Case("toy"))


class Leaky(Toy):
    """Looks one token ahead: the suite must notice."""

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        return super().forward(x + x.roll(-1, 1), ctx, state)


@pytest.mark.parametrize("name", ["prefix_is_invariant", "documents_are_separate"])
def test_the_suite_catches_a_leak(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXERS, "leaky", Leaky)
    check = next(check for check in CHECKS if check.__name__ == name)
    with pytest.raises(AssertionError):
        check(Case("leaky"))


@pytest.mark.parametrize("least", [1, 2**21])
def test_gates_of_one_head_are_what_two_heads_make_of_it(
    least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One head takes another product; a second one that is all zeros changes nothing."""
    monkeypatch.setattr("rondo.kernels.linear.LEAST", least)
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=8, dim=6, num_layers=1, ffn_dim=8, pattern=["lstm"])
    one = MIXERS["lstm"](config, RNNOptions(num_heads=1), 0)
    with torch.no_grad():
        one.weight.normal_()
    both = copy.deepcopy(one)
    both.weight = torch.nn.Parameter(torch.cat((one.weight, torch.zeros_like(one.weight))))
    u, x = torch.randn(2, 2, 5, 1, 6)
    wide = [F.pad(each, (0, 0, 0, 1)) for each in (u, x)]
    torch.testing.assert_close(one.gates(u, x), both.gates(*wide)[:, :, :, :1])
