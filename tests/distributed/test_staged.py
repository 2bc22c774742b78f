"""A run in stages, with replay, is the same run under any layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from rondo.pretrain.data.seen import NAME
from rondo.tests.distributed.spawn import run_ranks
from rondo.tests.distributed.staged_cases import LAYOUTS, staged
from rondo.tests.pretrain.test_stages import TIMES, options, run
from rondo.tests.pretrain.test_stages import corpora as corpora

MODEL = [
    "--model.num_layers=2",
    "--model.pattern=[gated_deltanet, attention]",
    "--model.mixers={gated_deltanet: {num_heads: 2, head_dim: 8}, attention: {num_heads: 2}}",
]


def test_stages_under_layouts_equal_one_process(corpora: Path, tmp_path: Path) -> None:
    expected = run(corpora, tmp_path, *MODEL)
    [found, _] = run_ranks(staged, 2, options(corpora, tmp_path, *MODEL), timeout=200)
    last = "checkpoints/step-000000012"
    for name in LAYOUTS:
        for row, wanted in zip(found[name], expected, strict=True):
            assert row.keys() - set(TIMES) == wanted.keys()
            for key, value in wanted.items():
                near = value if key == "stage" else pytest.approx(value, rel=1e-4, abs=1e-5)
                assert row[key] == near, (name, row["step"], key)
        seen = [tmp_path / "runs" / run / last / NAME for run in ("tiny", name)]
        assert seen[0].read_text() == seen[1].read_text()
