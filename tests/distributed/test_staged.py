"""A run in stages, with replay, is the same run under any layout, and killed under any it goes on
to the same end, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rondo.models.loading import read_tensors
from rondo.pretrain.data.seen import NAME
from rondo.tests.distributed.spawn import run_ranks
from rondo.tests.distributed.staged_cases import EXPERTS, LAYOUTS, staged
from rondo.tests.pretrain.test_stages import TIMES, equal, options, run
from rondo.tests.pretrain.test_stages import corpora as corpora

MODEL = [
    "--model.num_layers=2",
    "--model.pattern=[gated_deltanet, attention]",
    "--model.mixers={gated_deltanet: {num_heads: 2, head_dim: 8}, attention: {num_heads: 2}}",
    "--evals.every=0",
    "--logging.norms_every=0",
]


def test_stages_under_layouts_equal_one_process_and_end_alike_if_killed(
    corpora: Path, tmp_path: Path
) -> None:
    expected = run(corpora, tmp_path, *MODEL)
    [(found, resumed), _] = run_ranks(staged, 2, options(corpora, tmp_path, *MODEL), timeout=240)
    last = "checkpoints/step-000000012"
    for name in LAYOUTS:
        for row, wanted in zip(found[name], expected, strict=True):
            assert row.keys() - set(TIMES) == wanted.keys()
            for key, value in wanted.items():
                near = value if key == "stage" else pytest.approx(value, rel=1e-4, abs=1e-5)
                assert row[key] == near, (name, row["step"], key)
        seen = [tmp_path / "runs" / run / last / NAME for run in ("tiny", name)]
        assert seen[0].read_text() == seen[1].read_text()
        begins_from(tmp_path / "runs" / name / last, corpora, tmp_path)
    for name in (*LAYOUTS, *EXPERTS):
        steady = [[{**row, **dict.fromkeys(TIMES)} for row in of[name]] for of in (found, resumed)]
        assert steady[0] == steady[1], name
        ends = [tmp_path / "runs" / run / last for run in (name, f"{name}-killed")]
        for part in ("model", "optimizer"):
            assert equal(*(read_tensors(end / part) for end in ends)), (name, part)
        assert (ends[0] / NAME).read_text() == (ends[1] / NAME).read_text()


def begins_from(checkpoint: Path, corpora: Path, folder: Path) -> None:
    """A stage on one process begins with the parameters and moments of a checkpoint of a layout; at
    a rate of nearly 0 they stay."""
    stages = f"[{{{{name: next, steps: 1, init_from: {checkpoint}, reset_optimizer: false}}}}]"
    name, one = f"from-{checkpoint.parts[-3]}", f"--data.sources=[{{path: {corpora}/one.jsonl}}]"
    run(corpora, folder, *MODEL, f"--name={name}", one, "--optimizer.lr=1e-12", stages=stages)
    end = folder / "runs" / name / "checkpoints/step-000000001"
    there, here = (read_tensors(path / "model") for path in (checkpoint, end))
    assert there.keys() == here.keys()
    assert all(torch.allclose(there[key], here[key], atol=1e-7) for key in there)
    steps = [read_tensors(path / "optimizer")["head.weight.step"] for path in (checkpoint, end)]
    assert steps[1] == steps[0] + 1
