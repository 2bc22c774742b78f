"""Tasks of lm-evaluation-harness by name: its own, on local files, and ours from a seed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry

from rondo.errors import UserError
from rondo.evals import needle, positions, ruler
from rondo.evals.local_data import find_examples, find_file, read_rows
from rondo.evals.tasks import NAMES, PLANNING, examples, paths
from rondo.pretrain.data import Tokenizer
from rondo.pretrain.data.corpora import open_corpus

TEXT_TASK = "bits_per_byte"
_MEAN = [
    {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
]
# What the harness raises for a sample without the fields of the task's data set.
_UNFIT = (TemplateError, LookupError, TypeError, ValueError, AttributeError, SyntaxError)
_ROLLING = ("word_perplexity", "byte_perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Sources:
    """What tasks are made from."""

    tokenizer: Tokenizer
    """Measures the length of needles."""
    data_dir: Path | None = None
    """Folder with files of lm-eval's tasks; None: they come from the Hugging Face hub."""
    text: str = "stdlib-english"
    """Corpus for `bits_per_byte`, and to hide needles in."""
    samples: int = 500
    """Texts of a task from a seed."""
    seed: int = 0
    """Seeds those texts."""


@cache
def harness_tasks() -> TaskManager:
    """The harness's own list of tasks, which takes seconds to read."""
    return TaskManager()


class Catalog:
    """Finds tasks by name; the harness's own list is read when it is needed."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources

    def find(self, name: str) -> Any:
        """What `TaskManager.load` takes: a task, a group of tasks (an average of them is reported
        too), or the list of the tasks that a tag stands for.

        Raises:
            UserError: there is no such task, or the data folder has no file for it or for one of
                its parts.
        """
        if name == TEXT_TASK:
            return _text_task(self.sources.text)
        if kind_and_size(name):
            return _generated_task(name, self.sources)
        folder = self.sources.data_dir
        if folder is not None and not folder.is_dir():
            raise UserError(f"data_dir: {folder} is no folder")
        if name not in harness_tasks().task_index:
            near = difflib.get_close_matches(name, [*known(), *harness_tasks().all_tasks], n=3)
            raise UserError(
                f"tasks: unknown task {name!r} (nearest: {', '.join(near) or 'none'}; ours: "
                f"{', '.join(known())}; all others: lm_eval ls tasks)"
            )
        if folder is None:
            return name
        registry = harness_tasks().task_index
        return _LocalTasks(folder, name).build(registry[name], registry=registry)


class _LocalTasks(TaskFactory):
    """Builds tasks, alone or as parts of the group or tag `asked`, on files in a folder."""

    def __init__(self, folder: Path, asked: str) -> None:
        super().__init__()
        self.folder, self.asked = folder, asked

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Task:
        try:
            file = find_file(self.folder, entry.name)
        except UserError as error:
            if entry.name == self.asked:
                raise
            raise UserError(f"{error}; {entry.name} is a part of {self.asked}") from error
        settings = self._load_full_config(entry, overrides)
        if "class" in settings:
            raise UserError(f"data_dir: {entry.name} reads a data set of its own, never a file")
        shots = settings.get("num_fewshot") or 0
        fewshot = dict(settings.get("fewshot_config") or {})
        fewshot["split"] = None  # that of its data set, which is not here
        files = {"test": file}
        if shots and not fewshot.get("samples"):
            fewshot["split"] = "fewshot"
            files["fewshot"] = find_examples(self.folder, entry.name, shots)
        local = _dataset(partial(_local, files=files, task=entry.name))
        local["fewshot_config"] = fewshot
        try:
            task = super()._build_task(entry, {**(overrides or {}), **local})
            if "fewshot" in files:
                found = len(list(task.fewshot_docs()))
                if found < shots:
                    raise UserError(
                        f"{files['fewshot']} has {found} examples; {entry.name} shows {shots}"
                    )
                task.fewshot_context(task.eval_docs[0], num_fewshot=shots)
            return task
        except UserError:
            raise
        except _UNFIT as error:
            listed = " and ".join(_fields(path, entry.name) for path in files.values())
            why = f"there is no {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"data_dir: {listed}; {entry.name} needs the fields of its own data set: {why}"
            ) from error

    def _build_group_members(
        self,
        member_list: list[str | dict[str, Any]],
        group_name: str,
        overrides: dict[str, Any] | None,
        registry: dict[str, Entry],
    ) -> list[Task | Group]:
        for member in member_list:
            part = member if isinstance(member, str) else member.get("task")
            if isinstance(part, str) and part not in registry:
                # The harness would load it from the hub.
                raise UserError(
                    f"data_dir: {part} of the group {group_name} is no task by itself, so that no "
                    "file can stand in for its data set"
                )
        return super()._build_group_members(member_list, group_name, overrides, registry)


def known() -> list[str]:
    """Our tasks; SIZE stands for a number."""
    return [
        TEXT_TASK,
        *(f"{kind}_SIZE" for kind in positions.KINDS),
        *(f"{kind}_SIZE" for kind in (*NAMES, *needle.KINDS, *ruler.KINDS)),
    ]


def kind_and_size(name: str) -> tuple[str, int] | None:
    """Of a task from a seed, `parity_16`, or `mqar_64_4`: 4 of `mqar_64`; None for all others."""
    match = re.fullmatch(r"(\w+)_(\d+)", name)
    if match is None or match[1] not in (*NAMES, *needle.KINDS, *ruler.KINDS):
        return None
    return match[1], int(match[2])


def _dataset(build: Callable[..., Any]) -> dict[str, Any]:
    """Settings of a task whose samples are `build()["test"]`."""
    return {
        "custom_dataset": build,
        "dataset_path": None,
        "dataset_name": None,
        "dataset_kwargs": None,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": None,
    }


def _splits(rows: dict[str, list[dict[str, Any]]]) -> Any:
    from datasets import Dataset, DatasetDict

    made: dict[Any, Dataset] = {split: Dataset.from_list(each) for split, each in rows.items()}
    return DatasetDict(made)


def _local(*, files: dict[str, Path], task: str, **_: Any) -> Any:
    return _splits({split: read_rows(file, task) for split, file in files.items()})


def _fields(file: Path, task: str) -> str:
    return f"{file} has the fields {', '.join(read_rows(file, task)[0])}"


def _text_task(path: str) -> ConfigurableTask:
    def build(**_: Any) -> Any:
        return _splits({"test": [{"text": each} for each in open_corpus(path).documents()]})

    return ConfigurableTask(
        config={
            **_dataset(build),
            "task": TEXT_TASK,
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in _ROLLING],
            "metadata": {"version": 1.0},
        }
    )


def _generated_task(name: str, sources: Sources) -> ConfigurableTask:
    def build(**_: Any) -> Any:
        return _splits({"test": [{"prompt": p, "answer": a} for p, a in texts(name, sources)]})

    kind, size = kind_and_size(name) or (name, 0)
    how: dict[str, Any] = {"output_type": "loglikelihood", "metric_list": _MEAN}
    if kind in ruler.KINDS:
        how = _generates(ruler.NEW_TOKENS, [], ruler.found_value, ["acc"])
    elif kind == PLANNING:
        encode = sources.tokenizer.encode
        tokens = paths.longest(size, sources.seed) * max(len(encode(f" {n}")) for n in range(size))
        score = partial(paths.found_path, nodes=size, seed=sources.seed)
        how = _generates(tokens, ["\n"], score, ["acc", "acc_degree_1", "acc_degree_2"])
    return ConfigurableTask(
        config={
            **_dataset(build),
            **how,
            "task": name,
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "metadata": {"version": 1.0},
        }
    )


def _generates(
    tokens: int, until: list[str], score: Callable[..., dict[str, float]], metrics: list[str]
) -> dict[str, Any]:
    """Settings of a task that scores greedy text of so many tokens, with means of `metrics`."""
    return {
        "output_type": "generate_until",
        "generation_kwargs": {"until": until, "do_sample": False, "max_gen_toks": tokens},
        "process_results": score,
        "metric_list": [{**_MEAN[0], "metric": metric} for metric in metrics],
    }


def texts(name: str, sources: Sources) -> list[tuple[str, str]]:
    """Prompts and answers of a task from a seed, of the test split.

    Raises:
        UserError: the size is impossible.
    """
    kind, size = kind_and_size(name) or (name, 0)
    if kind in NAMES:
        found = islice(examples(kind, size, "test", seed=sources.seed), sources.samples)
        return [(each.prompt, each.answer) for each in found]
    drawn = (ruler if kind in ruler.KINDS else needle).samples(
        kind,
        size,
        sources.samples,
        seed=sources.seed,
        text=needle.real_text(sources.text),
        tokens=lambda text: len(sources.tokenizer.encode(text)),
    )
    return [(each.prompt, each.answer) for each in drawn]
