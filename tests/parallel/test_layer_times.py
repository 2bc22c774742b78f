"""Measured costs of layers: whose time is measured, and that stages follow it."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from rondo.models import MIXERS, ModelConfig
from rondo.models.mixer import SequenceContext, State
from rondo.parallel.layer_times import measure_layers
from rondo.parallel.pipeline import split_evenly
from rondo.tests.toys import Toy, registered

pytestmark = pytest.mark.quick
CPU = torch.device("cpu")


class Slow(Toy):
    """Takes its time."""

    def forward(
        self, x: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State]:
        time.sleep(0.05)
        return super().forward(x, ctx, state)


def test_stages_follow_what_layers_take() -> None:
    config = ModelConfig(
        vocab_size=30, dim=8, num_layers=8, pattern=["toy*6", "slow*2"], ffn_dim=16
    )
    with registered():
        MIXERS["slow"] = Slow
        try:
            times = measure_layers(config, 12, torch.bfloat16, CPU)
        finally:
            del MIXERS["slow"]
    assert len(times) == 8 and min(times) > 0
    assert times[1] == times[5], "layers of one kind are measured once"
    assert min(times[6:]) > 0.05 > max(times[:6])
    assert [len(stage) for stage in split_evenly(times, 2)] == [7, 1]


@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_every_mixer_and_what_crosses_layers(dtype: torch.dtype, tied: bool) -> None:
    with registered():
        pattern = [*MIXERS, "toy+toy_router", "toy+moe"]
        options = {"head_dim": 8}
        config = ModelConfig(
            vocab_size=30,
            dim=16,
            num_layers=len(pattern),
            pattern=pattern,
            mixers={"mamba2": options, "hgrn2": options, "deltanet": options},
            ffn_dim=16,
            tie_embeddings=tied,
        )
        assert len(measure_layers(config, 9, dtype, CPU)) == len(pattern)
