"""`python -m rondo.evals.against_hf`: a checkpoint and its export give the same scores.

Both are asked by the harness: the one as this project's model, the other as its own for
transformers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rondo.errors import UserError, run_command
from rondo.models import load
from rondo.models.loading import find_checkpoint
from rondo.pretrain.data import load_tokenizer
from rondo.pretrain.options import parse_command

USAGE = (
    "python -m rondo.evals.against_hf CHECKPOINT --exported FOLDER --data_dir DATA "
    "[--option value]..."
)


@dataclass
class AgainstConfig:
    """What is compared."""

    checkpoint: str
    """A checkpoint folder, or a run folder (its newest checkpoint)."""
    exported: str
    """The folder that `rondo export` wrote of it, of an architecture that transformers knows."""
    data_dir: str
    """Folder with `<task>.jsonl`, as for `rondo eval`."""
    tasks: str = "blimp_causative,piqa,lambada_openai,arc_easy"
    """Tasks of log-likelihoods, with commas between them."""
    limit: int = 50
    """Samples of a task; 0: all."""
    batch_sizes: str = "1,7,32"
    """Texts at once, each in turn, of this project's model; that of transformers reads one."""
    double: bool = False
    """Compare both with transformers' model in float64 too, which says whose rounding it is."""


def compare(config: AgainstConfig) -> dict[str, dict[str, float]]:
    """By task, the largest differences of log-likelihoods (nats), shown as a table.

    `batch N` are those between this project's model at that batch size and transformers', both in
    float32; with `double`, `ours` (at any batch size) and `theirs` are the differences of either
    from transformers' model in float64. `size` is the largest log-likelihood by absolute value,
    `accuracies` the number that are not the same, `requests` how many log-likelihoods were
    compared.

    Raises:
        UserError: there is no such task, file or checkpoint.
    """
    from lm_eval.models.huggingface import HFLM

    from rondo.evals.adapter import HarnessModel
    from rondo.evals.catalog import Catalog, Sources

    folder = find_checkpoint(Path(config.checkpoint))
    model, tokenizer = load(folder).eval(), load_tokenizer(folder / "tokenizer")
    samples = config.limit or Sources.samples
    catalog = Catalog(Sources(tokenizer, Path(config.data_dir), samples=samples))
    tasks = {name: catalog.find(name) for name in config.tasks.split(",")}
    sizes = [int(size) for size in config.batch_sizes.split(",")]
    limit = config.limit or None
    answers = {}
    for name, dtype in (("hf", "float32"), ("float64", "float64"))[: 1 + config.double]:
        theirs = HFLM(config.exported, batch_size=1, device="cpu", dtype=dtype)
        if theirs.tok_encode(_PROBE) != tokenizer.encode(_PROBE):
            raise UserError(
                f"exported: the tokenizer in {config.exported} has other ids than {folder}, "
                "so scores mean other texts; `rondo export` says when that is so"
            )
        answers[name] = _scores(theirs, tasks, limit)
    for size in sizes:
        adapter = HarnessModel(model, tokenizer, size)
        answers[f"batch {size}"] = _scores(adapter, tasks, limit)
    found = {name: _differences(name, answers, sizes) for name in tasks}
    _show(found)
    return found


_PROBE = "Whose words are these? 1,270 or more: the same in both."
_COUNTS = "requests", "size", "accuracies"
Scores = dict[str, tuple[list[float], dict[str, float]]]


@torch.no_grad()
def _scores(model: Any, tasks: dict[str, Any], limit: int | None) -> Scores:
    """By task, the log-likelihood of every request, and the accuracies."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False).load(list(tasks.values()))
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", 0)
    found = lm_eval.evaluate(model, loaded, limit=limit, bootstrap_iters=0)
    assert found is not None, "there is one rank only"
    return {
        name: (
            [answer[0][0] for row in found["samples"][name] for answer in row["resps"]],
            {k: v for k, v in found["results"][name].items() if k in ("acc,none", "acc_norm,none")},
        )
        for name in tasks
    }


def _differences(name: str, answers: dict[str, Scores], sizes: list[int]) -> dict[str, float]:
    def largest(a: str, b: str) -> float:
        pairs = zip(answers[a][name][0], answers[b][name][0], strict=True)
        return max(abs(x - y) for x, y in pairs)

    ours = [f"batch {size}" for size in sizes]
    found = {key: largest("hf", key) for key in ours}
    if "float64" in answers:
        exact = [largest(key, "float64") for key in ours]
        found |= {"ours": max(exact), "theirs": largest("hf", "float64")}
    found["requests"] = len(answers["hf"][name][0])
    found["size"] = max(abs(value) for value in answers["hf"][name][0])
    accuracies = answers["hf"][name][1]
    pairs = [(answers[key][name][1], accuracies) for key in ours]
    found["accuracies"] = sum(a[metric] != b[metric] for a, b in pairs for metric in b)
    return found


def _show(found: dict[str, dict[str, float]]) -> None:
    heads = list(next(iter(found.values())))
    table = Table("task", *heads, title="largest differences of log-likelihoods, nats")
    for name, row in found.items():
        cells = [f"{row[k]:.0f}" if k in _COUNTS else f"{row[k]:.1e}" for k in heads]
        table.add_row(name, *cells)
    Console(width=None if Console().is_terminal else 140).print(table)


def main(words: list[str]) -> int:
    """Runs the command; see `AgainstConfig`."""
    config = parse_command(AgainstConfig, words, USAGE, ("checkpoint",))
    if config is not None:
        if config.limit < 0:
            raise UserError(f"limit: must be at least 0 (all), got {config.limit}")
        compare(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
