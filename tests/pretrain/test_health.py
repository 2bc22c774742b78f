"""How Newton's method and neural memories get along is on the TensorBoard page and in the log."""

from __future__ import annotations

from pathlib import Path

import pytest

from rondo.pretrain import load_recipe, train

SMALL = ["--model.dim=16", "--model.num_layers=1", "--model.pattern=[para_gru]", "--steps=1"]
SMALL += ["--data.micro_batch_size=1", "--data.global_batch_size=1", "--evals.batches=0"]
SMALL += ["--schedule.warmup_steps=0"]
FAILING = (
    "--model.mixers={para_gru: {iterations: 1, max_iterations: 1, max_recurrent: null, "
    "recurrent_std: 2}}"
)


def test_health_is_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a fallback is said, with the step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = f"--data.folder={tmp_path}/data", f"--output_dir={tmp_path}/runs"
    for name, more, fallbacks in (("calm", [], 0), ("failing", [FAILING], 1)):
        options = [*SMALL, *folders, f"--name={name}", "--logging.tensorboard=true", *more]
        assert train(load_recipe("tiny", options)) == 0
        events = EventAccumulator(str(tmp_path / "runs" / name / "tensorboard")).Reload()
        scalars = {
            tag.removeprefix("train/"): events.Scalars(tag)[0].value
            for tag in events.Tags()["scalars"]
        }
        assert scalars["newton/fallbacks"] == fallbacks
        assert scalars["newton_fallback/00"] == fallbacks
        assert (scalars["newton_residual/00"] > 1e-6) == bool(fallbacks)
        assert scalars["newton_iterations/00"] >= 1
        assert (scalars["newton_product/00"] > 1) == bool(fallbacks)
        shown = capsys.readouterr()
        said = "step 1: Newton's method did not converge in 1 layer" in shown.out + shown.err
        assert said == bool(fallbacks)


def test_limits_of_a_memory_are_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [option for option in SMALL if "pattern" not in option and "steps=1" not in option]
    small += [f"--data.folder={tmp_path}/data", f"--output_dir={tmp_path}/runs", "--steps=3"]
    for bound, times in ((100.0, 0), (1e-3, 1)):
        mixers = f"{{titans_memory: {{num_heads: 1, max_weight: {bound}}}}}"
        options = [
            f"--model.mixers={mixers}",
            "--model.pattern=[titans_memory]",
            f"--name=b{bound}",
        ]
        assert train(load_recipe("tiny", [*small, *options])) == 0
        shown = capsys.readouterr()
        assert (shown.out + shown.err).count("a limit kept a neural memory in bounds") == times
