"""Runs pytest for some seconds, then interrupts it, so that it says what it has found by then.

python tests/gpu/until.py SECONDS [ARGUMENT...]
"""

from __future__ import annotations

import signal
import sys

import pytest

if __name__ == "__main__":
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(int(sys.argv[1]))
    sys.exit(pytest.main(sys.argv[2:]))
