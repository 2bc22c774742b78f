"""Starts the ranks of a run and decides by their exit code what comes next."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

from rondo.launch.folder import RunFolder

DONE, BAD_INPUT, STOPPED, INTERRUPTED = 0, 2, 75, 130
"""Exit codes of a rank that decide; every other is a failure that may pass."""
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Signals that ask for a checkpoint and an end: what schedulers send, and a lost terminal."""
_POLL_SECONDS = 0.2
_REPEAT_SECONDS = 10.0
"""How often ranks are asked to stop: the first time may come before they listen."""


class Ranks(Protocol):
    """All ranks of one start."""

    def poll(self) -> int | None:
        """The exit code that stands for all, once all have ended."""

    def stop(self) -> None:
        """Asks for a checkpoint and an orderly end."""

    def kill(self) -> None:
        """Ends them at once."""


@dataclass(frozen=True)
class Outcome:
    """How a launch ended."""

    name: str
    """`done`; `stopped` because `rondo stop` or Ctrl-C said so; `interrupted` after a checkpoint,
    to go on later; `failed`."""
    code: int
    """Exit code."""
    reason: str = ""


class Supervisor:
    """Starts ranks until they are done, told to stop, or fail too often without getting on.

    The signals of `STOPS` and Ctrl-C make the ranks stop after a checkpoint; a second Ctrl-C kills
    them.

    Args:
        folder: the run folder, whose lock this process holds.
        launch: id of the launch, for the log of events.
        begin: starts the ranks; an `Outcome` instead says why they cannot start.
        retries: failures in a row, without a new checkpoint, after which the ranks start again.
        facts: what else the log of events shall say of a start.
    """

    def __init__(
        self,
        folder: RunFolder,
        launch: str,
        begin: Callable[[], Ranks | Outcome],
        *,
        retries: int,
        **facts: Any,
    ) -> None:
        self.folder, self.launch, self.begin = folder, launch, begin
        self.retries, self.facts = retries, facts
        self.signals: list[signal.Signals] = []
        """What has come so far."""

    def run(self) -> Outcome:
        """Runs the ranks to an outcome, which it records."""
        numbers = {*STOPS, signal.SIGINT}
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)  # nohup: the run is to outlive its terminal
        before = {number: signal.signal(number, self._handle) for number in numbers}
        self.folder.record("start", launch=self.launch, **self.facts)
        try:
            outcome = self._until_settled()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self._record(outcome)
        return outcome

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(signal.Signals(number))

    def _until_settled(self) -> Outcome:
        failures, saved = 0, self.folder.saved_step()
        while True:
            code = self._attempt()
            if isinstance(code, Outcome):
                return code
            outcome = self._judge(code)
            if outcome is not None:
                return outcome
            failures = 1 if self.folder.saved_step() > saved else failures + 1
            saved = self.folder.saved_step()
            if failures > self.retries:
                reason = f"exit code {code}, and {failures} failure(s) since the last checkpoint"
                return Outcome("failed", code, reason)
            self.folder.record("failure", launch=self.launch, code=code, saved=saved)
            say(f"ranks failed with exit code {code}; starting again ({failures}/{self.retries})")

    def _attempt(self) -> int | Outcome:
        """One start of the ranks, to its end."""
        if self.signals:
            return STOPPED
        ranks = self.begin()
        if isinstance(ranks, Outcome):
            return STOPPED if self.signals else ranks
        asked = float("-inf")
        try:
            while (code := ranks.poll()) is None:
                if self.signals.count(signal.SIGINT) > 1:
                    ranks.kill()
                elif self.signals and time.monotonic() - asked > _REPEAT_SECONDS:
                    self._ask(ranks, first=asked < 0)
                    asked = time.monotonic()
                time.sleep(_POLL_SECONDS)
        except BaseException:
            ranks.kill()
            raise
        return code

    def _ask(self, ranks: Ranks, *, first: bool) -> None:
        if first:
            name = self.signals[0].name
            self.folder.record("signal", launch=self.launch, signal=name)
            say(f"{name}: asking the ranks to stop after a checkpoint")
        ranks.stop()

    def _judge(self, code: int) -> Outcome | None:
        """What an exit code means; None for a failure that may pass."""
        if code == DONE:
            return Outcome("done", DONE)
        if code in (BAD_INPUT, INTERRUPTED):
            return Outcome("failed", code, f"exit code {code}: see the logs of the ranks")
        if code != STOPPED and not self.signals:
            return None
        if self.folder.stop_file.exists() or signal.SIGINT in self.signals:
            return Outcome("stopped", STOPPED, "asked to stop")
        reason = "" if code == STOPPED else f"exit code {code} when asked to stop"
        return Outcome("interrupted", STOPPED, reason)

    def _record(self, outcome: Outcome) -> None:
        self.folder.record(
            "end",
            launch=self.launch,
            outcome=outcome.name,
            code=outcome.code,
            reason=outcome.reason,
            saved=self.folder.saved_step(),
        )
        say(f"{outcome.name}{f': {outcome.reason}' if outcome.reason else ''}")


def say(text: str) -> None:
    """A line on the console."""
    print(f"rondo launch: {text}", file=sys.stderr, flush=True)
