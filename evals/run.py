"""`rondo eval`: scores a checkpoint on tasks, a result file each."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from rondo.errors import UserError, run_command
from rondo.evals import positions
from rondo.evals.state_heads import StateHeads
from rondo.models import Decoder, load
from rondo.models.loading import find_checkpoint
from rondo.pretrain.data import Tokenizer, load_tokenizer
from rondo.pretrain.data.embedded import EMBEDDED
from rondo.pretrain.options import parse_command

USAGE = "rondo eval CHECKPOINT_OR_RUN --tasks A,B [--option value]..."
FEWSHOT_SEED = 1234  # the default of the harness
_STDERR_DRAWS = 100
# The other ranks wait while rank 0 measures by position, or a rank has longer texts than they.
_PATIENCE = timedelta(days=1)
# What does not change a result.
_FREE = ("checkpoint", "step", "tasks", "batch_size", "output", "device", "overwrite")
_PLACES = ("data_dir", "text")


@dataclass
class EvalConfig:
    """What `rondo eval` scores."""

    checkpoint: str
    """A checkpoint folder, or a run folder (its newest checkpoint)."""
    tasks: str
    """Names with commas between them: any of lm-eval's (`lm_eval ls tasks`), `bits_per_byte`,
    `positions_8192` (loss and states by position in texts of so many tokens; `newlines_8192` and
    `capitals_8192` are of one token again and again), or one from a seed with its size, as in
    `mqar_64_4,parity_40,passkey_1024`."""
    step: int | None = None
    """Of a run, the checkpoint with this number of steps."""
    limit: int | None = None
    """Samples of a task at most; None: all."""
    batch_size: int = 8
    """Texts at once; scores do not depend on it."""
    output: str | None = None
    """Folder for the results; a folder a checkpoint; None: `evals` in the run folder."""
    data_dir: str | None = None
    """Folder with `<task>.jsonl` for lm-eval's tasks; None: from the Hugging Face hub."""
    text: str = "stdlib-english"
    """Text for `bits_per_byte`, `positions` and needles: a file, a folder, an embedded corpus."""
    samples: int = 500
    """Texts of each task from a seed, and of `positions`."""
    seed: int = 0
    """Seeds those texts."""
    overwrite: bool = False
    """Score again what has a result."""
    device: str = "auto"
    """Where the model runs; auto: a GPU if there is one."""


def evaluate(config: EvalConfig) -> dict[str, dict[str, Any]]:
    """Results by task, as lm-evaluation-harness gives them; on ranks other than 0, those that
    were not there yet are missing.

    A result is written as a whole to `<run>/evals/step-N/<task>.json` as soon as the task is
    done, and its numbers to `<run>/tensorboard/evals`; tasks that have one are not scored again.

    Raises:
        UserError: there is no checkpoint or task of a name, or a result that is there was
            made with other options.
    """
    checkpoint = _checkpoint(config)
    names = [name.strip() for name in config.tasks.split(",") if name.strip()]
    if not names:
        raise UserError("tasks: at least one name is needed")
    for name in ("samples", "batch_size", "limit"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name}: must be at least 1, got {value}")
    folder = _output(config, checkpoint)
    files = {name: folder / f"{name}.json" for name in dict.fromkeys(names)}
    results = {}
    if not config.overwrite:
        results = {n: _finished(file, config) for n, file in files.items() if file.is_file()}
    missing = [name for name in files if name not in results]
    if missing:
        with _Ranks() as ranks:
            missing = ranks.agree(missing)
            for name, result in _score(config, checkpoint, missing):
                results[name] = {**result, "rondo": _options(config, checkpoint)}
                _write(files[name], results[name])
                _tensorboard(folder, checkpoint, name, result)
    return results


def _score(config: EvalConfig, checkpoint: Path, names: list[str]) -> Any:
    """Yields each task and its result, on rank 0."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no fork of a process that holds a model
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval
    from lm_eval.tasks import TaskManager

    from rondo.evals.adapter import HarnessModel
    from rondo.evals.catalog import Catalog, Sources, harness_tasks

    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    folder = Path(config.data_dir).expanduser() if config.data_dir else None
    catalog = Catalog(Sources(tokenizer, folder, config.text, _texts(config), config.seed))
    by_position = [name for name in names if positions.length_of(name)]
    # A wrong name shows before the work.
    tasks = {name: catalog.find(name) for name in names if name not in by_position}
    model = load(checkpoint, pick_device(config.device)).eval()
    adapter = HarnessModel(model, tokenizer, config.batch_size)
    for name in by_position if adapter.own == 0 else ():
        yield name, _positions(name, config, checkpoint, model, tokenizer)
    ready = TaskManager(include_defaults=False)  # the whole list takes seconds to read
    for name, task in tasks.items():
        manager = harness_tasks() if isinstance(task, str) else ready
        loaded = manager.load(task if isinstance(task, list) else [task])
        for each in loaded["tasks"].values():
            if each.get_config("num_fewshot") is None:
                each.set_config("num_fewshot", 0)
            each.set_fewshot_seed(FEWSHOT_SEED)
        result = lm_eval.evaluate(
            adapter,
            loaded,
            limit=config.limit,
            bootstrap_iters=_STDERR_DRAWS,
            log_samples=False,
        )
        if adapter.own == 0 and result is not None:
            yield name, {**result, "config": _about(config, checkpoint), "date": time.time()}


def _texts(config: EvalConfig) -> int:
    """How many texts of a task from a seed are scored: no more are made, as a few of more would
    have their passkeys near the beginning."""
    return min(config.samples, config.limit or config.samples)


def _positions(
    name: str, config: EvalConfig, checkpoint: Path, model: Decoder, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The result of `positions_N`, `newlines_N` or `capitals_N`."""
    count = _texts(config)
    kind, length = name.partition("_")[0], positions.length_of(name) or 0
    if kind in positions.DEGENERATE:
        texts = positions.degenerate(kind, tokenizer, length, count)
    else:
        texts = positions.rows(config.text, tokenizer, length, count)
    trained, about = positions.trained_length(checkpoint), _about(config, checkpoint)
    heads = StateHeads()
    found = positions.curves(model, texts, config.batch_size, progress=True, heads=heads)
    first, more, most = positions.of_first_token(model, texts[0], trained)
    result = positions.result(name, {**found, **first}, more, trained, heads, most, about)
    return {**result, "date": time.time()}


def _about(config: EvalConfig, checkpoint: Path) -> dict[str, Any]:
    """What the harness writes under `config`."""
    return {
        "model": "rondo",
        "model_args": str(checkpoint),
        "batch_size": config.batch_size,
        "device": pick_device(config.device),
        "limit": config.limit,
        "bootstrap_iters": _STDERR_DRAWS,
        "fewshot_seed": FEWSHOT_SEED,
    }


def _checkpoint(config: EvalConfig) -> Path:
    path = Path(config.checkpoint).expanduser()
    if config.step is None:
        return find_checkpoint(path)
    if (path / "manifest.json").is_file():
        raise UserError(f"step: {path} is a checkpoint, not a run to choose one from")
    folder = path / "checkpoints" / f"step-{config.step:09d}"
    if not (folder / "manifest.json").is_file():
        there = [p.parent.name for p in (path / "checkpoints").glob("step-*/manifest.json")]
        raise UserError(
            f"step: no checkpoint {folder} (there: {', '.join(sorted(there)) or 'none'})"
        )
    return folder


def _output(config: EvalConfig, checkpoint: Path) -> Path:
    """Where the results of a checkpoint lie."""
    checkpoint = checkpoint.resolve()
    if config.output:
        return Path(config.output).expanduser() / checkpoint.name
    if checkpoint.parent.name != "checkpoints":
        raise UserError(f"output: {checkpoint} is in no run folder; say where: --output FOLDER")
    return checkpoint.parent.parent / "evals" / checkpoint.name


def _options(config: EvalConfig, checkpoint: Path) -> dict[str, Any]:
    """What a result depends on beside its task."""
    options: dict[str, Any] = {name: v for name, v in asdict(config).items() if name not in _FREE}
    options |= {name: _absolute(options[name]) for name in _PLACES}
    return {"checkpoint": str(checkpoint), "options": options}


def _absolute(place: str | None) -> str | None:
    """A path that means the same in every working directory; what is no path stays."""
    if place is None or place in EMBEDDED or not Path(place).expanduser().exists():
        return place
    return os.path.abspath(Path(place).expanduser())


def _finished(file: Path, config: EvalConfig) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text())
        made = dict(result["rondo"]["options"])
        made |= {name: _absolute(made.get(name)) for name in _PLACES}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no result of `rondo eval`; --overwrite true replaces it"
        ) from error
    wanted = _options(config, Path())["options"]
    other = [f"{k}={made.get(k)}, not {v}" for k, v in wanted.items() if made.get(k) != v]
    if other:
        raise UserError(f"{file} was made with {'; '.join(other)}; --overwrite true replaces it")
    return result


def _write(file: Path, result: dict[str, Any]) -> None:
    for settings in result["configs"].values():
        settings.pop("custom_dataset", None)  # a function
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(result, indent=1, default=str))
    beside.replace(file)


def _tensorboard(folder: Path, checkpoint: Path, name: str, result: dict[str, Any]) -> None:
    """A folder beside that of training: a reader leaves a file for good when a newer one comes."""
    step = checkpoint.name.removeprefix("step-")
    if folder.parent.name != "evals" or not step.isdecimal():
        return
    from torch.utils.tensorboard import SummaryWriter  # a second to import

    writer = SummaryWriter(folder.parent.parent / "tensorboard" / "evals")
    for task, metrics in result["results"].items():
        path = name if task == name else f"{name}/{task}"
        for key, value in numbers(metrics).items():
            writer.add_scalar(f"evals/{path}/{key.removesuffix(',none')}", value, int(step))
    for curve, points in result.get("curves", {}).items():
        for position, value in points.items():
            writer.add_scalar(f"evals/{name}/{curve}/{int(position):07d}", value, int(step))
    writer.close()


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a task's metrics; `alias`, `N/A` and sample counts are none."""
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value) and "," in key
    }


def pick_device(name: str) -> str:
    """The device called `name`; "auto" is this rank's GPU where there are any, else the CPU."""
    if name != "auto":
        return name
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


class _Ranks:
    """torch.distributed while torchrun has started several ranks."""

    def __enter__(self) -> _Ranks:
        self.started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
        if self.started:
            dist.init_process_group(
                "gloo" if not torch.cuda.is_available() else "cpu:gloo,cuda:nccl",
                timeout=_PATIENCE,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.started:
            dist.destroy_process_group()

    def agree(self, names: list[str]) -> list[str]:
        """Rank 0's list: another rank may have looked later."""
        box = [names]
        if dist.is_initialized():
            dist.broadcast_object_list(box)
        return box[0]


def show(results: dict[str, dict[str, Any]]) -> None:
    """Prints every metric with its standard error."""
    table = Table("task", "metric", "value", "±")
    for result in results.values():
        for task, metrics in result["results"].items():
            found = numbers(metrics)
            for key, value in found.items():
                if "_stderr" not in key:
                    error = found.get(key.replace(",", "_stderr,", 1))
                    table.add_row(task, key, f"{value:.4f}", f"{error:.4f}" if error else "")
    Console().print(table)


def main(words: list[str]) -> int:
    """Runs the command; see `EvalConfig`."""
    words = [f"{w}=true" if w == "--overwrite" else w for w in words]
    config = parse_command(EvalConfig, words, USAGE, ("checkpoint",))
    if config is not None:
        results = evaluate(config)
        if int(os.environ.get("RANK", "0")) == 0:
            show(results)
    return 0


if __name__ == "__main__":  # torchrun -m rondo.evals.run
    sys.exit(run_command(lambda: main(sys.argv[1:])))
