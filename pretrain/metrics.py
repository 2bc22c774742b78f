"""What a run reports: a line a step in metrics.jsonl, the same in TensorBoard, and the console."""

from __future__ import annotations

import json
import math
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_CONSOLE = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu")


class Metrics:
    """Writes the metrics of one run; every rank but the first writes nothing.

    Rows from `start` on, left by a run that went further than its last checkpoint, are dropped.

    Args:
        folder: the run folder.
        start: step the run goes on from (0 for a new one).
        steps: steps of the run, for the progress bar.
        every: steps between lines where the console is no terminal.
        tensorboard: write event files too.
        active: False on all ranks but the first.
    """

    def __init__(
        self, folder: Path, *, start: int, steps: int, every: int, tensorboard: bool, active: bool
    ) -> None:
        self.active, self.every, self.steps = active, every, steps
        self.fresh = False
        """Whether there are no rows before `start`."""
        self._events = None
        self._stage: str | None = None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = rows(path, before=start)
        self.fresh = not kept
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        beside.replace(path)
        self._file = path.open("a", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second to import

            self._events = SummaryWriter(folder / "tensorboard", purge_step=start)
        self.console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, completed=start)

    def __enter__(self) -> Metrics:
        if self.active:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.active:
            return
        self._progress.stop()
        self._file.close()
        if self._events is not None:
            self._events.close()

    def log(
        self,
        row: Mapping[str, float],
        extra: Mapping[str, float] | None = None,
        tables: Mapping[str, list[list[float]]] | None = None,
        stage: str | None = None,
    ) -> None:
        """Reports step `row["step"]`; `extra` (validation, norms) goes into the same row, and so do
        `tables`, which TensorBoard shows as heat maps, and the name of the `stage`, which it shows
        where that changes."""
        if not self.active:
            return
        values = {**row, **(extra or {})}
        step = int(values["step"])
        # JSON has no NaN or infinity.
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        words = {} if stage is None else {"stage": stage}
        self._file.write(json.dumps({**finite, **words, **(tables or {})}) + "\n")
        if self._events is not None:
            if stage is not None and stage != self._stage:
                self._events.add_text("stage", stage, step)
            for name, value in values.items():
                if name not in ("step", "time"):
                    tag = name if "/" in name else f"train/{name}"
                    self._events.add_scalar(tag, value, step)
            for name, table in (tables or {}).items():
                writer: Any = self._events._get_file_writer()
                writer.add_summary(heat_map(name, table), step)
        self._stage = stage
        text = "  ".join(f"{name} {_short(name, values[name])}" for name in _CONSOLE)
        text = text if stage is None else f"{stage}  {text}"
        self._progress.update(self._task, completed=step + 1, description=text)
        if not self.console.is_terminal and (step + 1) % self.every == 0:
            print(f"step {step + 1}/{self.steps}  {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line on the console."""
        if self.active:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


def heat_map(tag: str, table: Sequence[Sequence[float | None]], cell: int = 16) -> Any:
    """TensorBoard's image of a table: from white for 0 to black for the largest value, `cell`
    pixels a value, and stripes where there is none (None). A PNG needs no more than zlib, so no
    image library is asked for."""
    from tensorboard.compat.proto import summary_pb2

    proto: Any = summary_pb2
    largest = max((value for row in table for value in row if value), default=1.0)
    lines = [
        b"\0" + b"".join(_pixels(value, largest, line, cell) for value in row)
        for row in table
        for line in range(cell)
    ]
    height, width = len(lines), len(lines[0]) - 1

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    png = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    )
    png += chunk(b"IDAT", zlib.compress(b"".join(lines))) + chunk(b"IEND", b"")
    size = {"height": height, "width": width, "colorspace": 1}
    image = proto.Summary.Image(**size, encoded_image_string=png)
    return proto.Summary(value=[proto.Summary.Value(tag=tag, image=image)])


def _pixels(value: float | None, largest: float, line: int, cell: int) -> bytes:
    """A line of the `cell` x `cell` grey pixels of a value."""
    if value is None:
        return bytes(255 * ((line + column) // 2 % 2) for column in range(cell))
    return bytes([255 - round(255 * value / largest)]) * cell


def rows(path: Path, *, before: int) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl of steps before `before`; a torn last line is dropped."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["step"] < before:
                kept.append(row)
    return kept


def _short(name: str, value: float) -> str:
    if name == "mfu":
        return f"{100 * value:.1f}%"
    if name == "tokens_per_second":
        return f"{value:,.0f}"
    return f"{value:.2e}" if name == "lr" else f"{value:.4f}"
