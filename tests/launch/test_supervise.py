"""What a launcher makes of exit codes and signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from rondo.launch.folder import RunFolder
from rondo.launch.supervise import STOPS, Outcome, Supervisor


class FakeRanks:
    """Ranks that end as told, or once they are asked to."""

    def __init__(self, code: int | None, before: Callable[[], None], when_asked: int = 75) -> None:
        self.code, self.when_asked = code, when_asked
        self.asked = self.killed = 0
        before()

    def poll(self) -> int | None:
        return self.code

    def stop(self) -> None:
        self.asked += 1
        self.code = self.when_asked

    def kill(self) -> None:
        self.killed += 1
        self.code = 137


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def save(folder: RunFolder, step: int) -> Callable[[], None]:
    path = folder.path / "checkpoints" / f"step-{step:09d}"
    return lambda: path.mkdir(parents=True, exist_ok=True)


def run(folder: RunFolder, *starts: FakeRanks | Callable, retries: int = 2) -> Outcome:
    """The outcome of these starts of the ranks; all must have been made."""
    left = list(starts)

    def begin() -> FakeRanks:
        start = left.pop(0)
        return start if isinstance(start, FakeRanks) else start()

    outcome = Supervisor(folder, "id", begin, retries=retries).run()
    assert not left, "ranks were not started often enough"
    assert folder.outcome() == outcome.name
    return outcome


def ends(code: int, before: Callable[[], None] = lambda: None) -> Callable[[], FakeRanks]:
    return lambda: FakeRanks(code, before)


def sends(*numbers: int) -> Callable[[], None]:
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


def test_exit_codes(folder: RunFolder) -> None:
    for code, name in ((0, "done"), (2, "failed"), (130, "failed"), (75, "interrupted")):
        outcome = run(folder, ends(code))
        assert (outcome.name, outcome.code) == (name, code)


@pytest.mark.parametrize("code", [1, 137, 139, 255])
def test_failures_are_tried_again_up_to_a_limit(code: int, folder: RunFolder) -> None:
    assert run(folder, ends(code), ends(0)).name == "done"
    outcome = run(folder, ends(code), ends(code), ends(code))
    assert (outcome.name, outcome.code) == ("failed", code)
    assert "3 failure(s) since the last checkpoint" in outcome.reason
    assert run(folder, ends(code), retries=0).name == "failed"


def test_a_checkpoint_between_failures_makes_good(folder: RunFolder) -> None:
    starts = [ends(1, save(folder, step)) for step in (5, 10, 15, 20)]
    assert run(folder, *starts, ends(0)).name == "done"
    assert [row["saved"] for row in folder.events("failure")] == [5, 10, 15, 20]


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_leads_to_an_interruption(number: signal.Signals, folder: RunFolder) -> None:
    signal.signal(number, signal.SIG_DFL)  # whoever started the tests may ignore some
    ranks = []

    def start(code: int) -> Callable[[], FakeRanks]:
        return lambda: ranks.append(FakeRanks(None, sends(number), code)) or ranks[-1]

    outcome = run(folder, start(75))
    assert (outcome.name, outcome.code) == ("interrupted", 75)
    assert ranks[0].asked == 1
    assert folder.events("signal")[0]["signal"] == number.name
    # Ranks that had no time to save go on from the last checkpoint all the same.
    assert run(folder, start(137)).name == "interrupted"
    assert run(folder, start(0)).name == "done"
    assert run(folder, start(2)).name == "failed"
    assert signal.getsignal(number) == signal.SIG_DFL  # as before


def test_a_lost_terminal_is_ignored_under_nohup(folder: RunFolder) -> None:
    class ShortRanks(FakeRanks):
        """They end by themselves when they have been looked at twice."""

        looks = 0

        def poll(self) -> int | None:
            self.looks += 1
            return self.code if self.looks < 3 else self.code or 0

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ranks = []
    try:
        start = lambda: ranks.append(ShortRanks(None, sends(signal.SIGHUP))) or ranks[-1]  # noqa: E731
        assert run(folder, start).name == "done"
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ranks[0].asked == 0


def test_a_stop_by_the_user_is_final(folder: RunFolder) -> None:
    folder.launch.mkdir()
    folder.stop_file.touch()
    assert run(folder, lambda: FakeRanks(None, sends(signal.SIGTERM))).name == "stopped"
    folder.stop_file.unlink()
    assert run(folder, lambda: FakeRanks(None, sends(signal.SIGINT))).name == "stopped"


def test_a_second_ctrl_c_kills(folder: RunFolder) -> None:
    ranks = FakeRanks(None, lambda: None)

    def begin() -> FakeRanks:
        sends(signal.SIGINT, signal.SIGINT)()
        return ranks

    assert run(folder, begin).name == "stopped"
    assert ranks.killed == 1 and ranks.asked == 0


def test_ranks_that_cannot_start(folder: RunFolder) -> None:
    outcome = Outcome("failed", 1, "every node is bad")
    assert Supervisor(folder, "id", lambda: outcome, retries=9).run() == outcome
    assert folder.events("end")[0]["reason"] == "every node is bad"


def test_ranks_are_killed_when_the_launcher_fails(folder: RunFolder) -> None:
    ranks = FakeRanks(None, lambda: None)
    ranks.poll = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        Supervisor(folder, "id", lambda: ranks, retries=0).run()
    assert ranks.killed == 1
