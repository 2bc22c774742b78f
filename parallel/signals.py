"""Signals that ask for a checkpoint and an orderly end."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from rondo.errors import UserError


class StopFlag:
    """While in the `with` block, signals set `raised` and do nothing else, however often they
    come: a scheduler may send them again while the checkpoint is written.

    Handlers run in the main thread between bytecodes, so that code inside a long C call sees
    the flag only afterwards. The handlers from before come back at the end.

    Args:
        signals: names such as "SIGUSR1"; SIGTERM is always among them.

    Raises:
        UserError: a name is no signal's, or a signal that cannot be handled.
    """

    def __init__(self, signals: Sequence[str]) -> None:
        self.raised = False
        """Whether a signal has come."""
        self._signals = {signal.SIGTERM, *map(_parse, signals)}
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.raised = True


def _parse(name: str) -> signal.Signals:
    if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
        raise UserError(
            f"checkpoint.signal: {name!r} is not a signal that can be handled; "
            "SIGUSR1, SIGUSR2 or SIGHUP are"
        )
    return signal.Signals[name]
