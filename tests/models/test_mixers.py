"""Every registered mixer passes the conformance suite; so does one registered here."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rondo.kernels import linear_scan
from rondo.models import MIXERS, Mixer
from rondo.models.config import ModelConfig
from rondo.models.layers import Linear, at_least_float32
from rondo.models.mixer import SequenceContext, State, get
from rondo.tests.mixer_suite import CHECKS, Case

VARIANTS = [
    Case("attention", {"num_heads": 4, "num_kv_heads": 2, "window": 9, "rope": False}),
    Case("attention", {"num_heads": 2, "qk_norm": False}),
    Case("mamba2", {"head_dim": 8, "state_dim": 8, "num_groups": 2}),
    Case("deltanet", {"head_dim": 8, "negative_eigenvalues": True, "output_gate": True}),
    Case("gated_deltanet", {"head_dim": 8, "negative_eigenvalues": True, "output_gate": False}),
]
SMALL = {
    "attention": {"num_heads": 2},
    "mamba2": {"head_dim": 16, "state_dim": 8},
    "retnet": {"num_heads": 2},
    "hgrn2": {"head_dim": 8},
    "deltanet": {"head_dim": 16},
}
CASES = [Case(name, SMALL.get(name, {})) for name in MIXERS] + VARIANTS


@dataclass
class ToyOptions:
    """No hyper-parameters."""


class Toy(Mixer):
    """An exponential moving average with a learned, data-dependent rate a channel."""

    Options = ToyOptions
    sharding = {"in_proj": "column", "rate_proj": "column", "out_proj": "row"}  # noqa: RUF012

    def __init__(self, config: ModelConfig, options: ToyOptions, layer: int) -> None:
        super().__init__(config, options, layer)
        self.scan = linear_scan
        self.in_proj = Linear(config.dim, config.dim, std=config.init_std)
        self.rate_proj = Linear(config.dim, config.dim, std=config.init_std)
        self.out_proj = Linear(config.dim, config.dim, std=config.residual_std)

    @classmethod
    def heads(cls, config: ModelConfig, options: ToyOptions) -> dict[str, int]:
        return {"dim": config.dim}

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        keep = at_least_float32(self.rate_proj(x)).sigmoid()
        h, last = self.scan(
            keep,
            (1 - keep) * self.in_proj(x),
            initial_state=get(state, "recurrent"),
            segment_ids=ctx.segment_ids,
        )
        return self.out_proj(h.to(x.dtype)), {"recurrent": last}

    def state_shapes(
        self, batch: int, length: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"recurrent": ((batch, self.config.dim), torch.float32)}

    def operator_flops(self, length: int) -> float:
        return 2.0 * self.config.dim


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
