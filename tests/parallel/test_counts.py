"""Events that mixers count: sums over layers, from zero each time."""

from __future__ import annotations

import pytest
import torch

from rondo.models import Decoder, ModelConfig
from rondo.parallel.counts import take_counts
from rondo.parallel.mesh import Ranks

pytestmark = pytest.mark.quick
ALONE = Ranks(0, 1, torch.device("cpu"), None)


def test_counts_are_taken_once_and_only_in_training() -> None:
    options = {"head_dim": 8, "max_update": 1e-6}  # below any gradient: acts on every token
    config = ModelConfig(
        vocab_size=11,
        dim=16,
        num_layers=4,
        pattern=["titans_memory*3", "retnet"],
        mixers={"titans_memory": options},
    )
    model = Decoder(config, seed=0)
    tokens = torch.arange(10)[None] % 11
    model(tokens)
    per_layer = 10 * 2 * 2  # tokens, heads, matrices
    assert take_counts([model], ALONE) == {"titans_memory/limited": 3.0 * per_layer}
    assert take_counts([model], ALONE) == {"titans_memory/limited": 0.0}
    model.eval()
    model(tokens)
    assert take_counts([model], ALONE) == {"titans_memory/limited": 0.0}
    plain = ModelConfig(vocab_size=11, dim=16, num_layers=1, pattern=["retnet"])
    assert take_counts([Decoder(plain, seed=0)], ALONE) == {}
