"""Signals set a flag and nothing else."""

from __future__ import annotations

import os
import signal

import pytest

from rondo.errors import UserError
from rondo.parallel.signals import StopFlag


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_sets_the_flag_however_often_it_comes(name: str) -> None:
    before = signal.getsignal(signal.Signals[name])
    with StopFlag(["SIGUSR1"]) as stop:
        assert not stop.raised
        for _ in range(3):
            os.kill(os.getpid(), signal.Signals[name])
            assert stop.raised
    assert signal.getsignal(signal.Signals[name]) is before
    assert stop.raised


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), StopFlag([]):
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP", "USR1", "SIG_DFL", ""])
def test_what_cannot_be_handled_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"checkpoint.signal: '{name}'.*SIGUSR1"):
        StopFlag([name])
