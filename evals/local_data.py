"""Local files with the samples of lm-evaluation-harness's tasks, in the fields it expects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rondo.errors import UserError

Row = dict[str, Any]


def find_file(folder: Path, task: str) -> Path:
    """The JSON lines file of a task: `<task>.jsonl` anywhere in the folder; for `blimp_NAME`,
    `NAME.jsonl` too, and `<task>_val_sample.jsonl`.

    Raises:
        UserError: no such file, or several.
    """
    return _only(folder, [task, task.removeprefix("blimp_"), f"{task}_val_sample"])


def find_examples(folder: Path, task: str, count: int) -> Path:
    """The JSON lines file of the `count` examples that a few-shot task shows before each sample:
    `<task>_train.jsonl` or `<task>_fewshot.jsonl` anywhere in the folder.

    Raises:
        UserError: no such file, or several.
    """
    try:
        return _only(folder, [f"{task}_train", f"{task}_fewshot"])
    except UserError as error:
        raise UserError(
            f"{error}; {task} shows {count} examples before each sample, which must not be among "
            "those that are scored"
        ) from error


def _only(folder: Path, names: list[str]) -> Path:
    found = sorted({file for name in names for file in folder.rglob(f"{name}.jsonl")})
    if len(found) != 1:
        wanted = " or ".join(dict.fromkeys(f"{name}.jsonl" for name in names))
        listed = ", ".join(str(file) for file in found) or "nothing"
        raise UserError(f"data_dir: expected one {wanted} in {folder}, found {listed}")
    return found[0]


def read_rows(file: Path, task: str) -> list[Row]:
    """Samples with the fields of the task's own data set. Files that have them are taken as they
    are; those with `query`, `choices` and `gold`, or `context` and `continuation`, are renamed.

    Raises:
        UserError: a line is no JSON object, or there is no way to name its fields.
    """
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}:{number}: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{file}:{number}: expected an object, got {line[:40]!r}")
            rows.append(row)
    if not rows:
        raise UserError(f"{file} is empty")
    if not ({"query", "choices", "gold"} <= rows[0].keys() or "continuation" in rows[0]):
        return rows
    if task not in _RENAME:
        raise UserError(
            f"{file} has the fields {', '.join(rows[0])}, which are renamed for "
            f"{', '.join(_RENAME)} only; {task} needs those of its own data set"
        )
    return [_RENAME[task](row) for row in rows]


def _question(row: Row) -> str:
    return str(row["query"]).removeprefix("Question: ").removesuffix("\n")


def _piqa(row: Row) -> Row:
    first, second = row["choices"]
    return {"goal": _question(row), "sol1": first, "sol2": second, "label": row["gold"]}


def _arc(row: Row) -> Row:
    labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    choices = {"text": row["choices"], "label": labels}
    return {"question": _question(row), "choices": choices, "answerKey": labels[row["gold"]]}


def _lambada(row: Row) -> Row:
    return {"text": f"{row['context'].rstrip(' ')} {row['continuation'].strip()}"}


_RENAME: dict[str, Callable[[Row], Row]] = {
    "piqa": _piqa,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "lambada_openai": _lambada,
}
