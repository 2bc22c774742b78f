"""What a user can put right, and how a command says so. Standard library only."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

_FILE_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)
# Names to import whose package is called otherwise, and packages that an extra adds.
_PACKAGES = {"yaml": "pyyaml", "megatron": "megatron-core", "flash_attn": "flash-attn"}
_EXTRAS = {
    "flash-attn": "gpu",
    "lm_eval": "evals",
    "plotly": "report",
    "transformers": "hf",
    "triton": "gpu",
}
# Launchers end every rank when the first one leaves: this long the others let rank 0 speak first.
_SPEAK_LAST_SECONDS = 10.0


class UserError(ValueError):
    """Bad input: shown as one message with exit code 2, without a traceback."""


def run_command(command: Callable[[], int]) -> int:
    """Exit code of `command()`, with errors of the user's input as one message on stderr.

    2 for bad input (UserError, missing or forbidden files, missing packages), 130 for Ctrl-C.
    Everything else is a bug and keeps its traceback; RONDO_DEBUG=1 shows all tracebacks.
    """
    try:
        return command()
    except KeyboardInterrupt:
        _report("interrupted")
        return EXIT_INTERRUPTED
    except (UserError, *_FILE_ERRORS) as error:
        _report(f"error: {error}")
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "rondo":
            raise
        _report(f"error: {_missing_package(error.name)}")
    return EXIT_BAD_INPUT


def _missing_package(module: str) -> str:
    package = _PACKAGES.get(module.partition(".")[0], module.partition(".")[0])
    extra = f" (it is in the extra '{_EXTRAS[package]}')" if package in _EXTRAS else ""
    return f"the package {package!r} is not installed{extra}; add it with: pip install {package}"


def _report(message: str) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        time.sleep(_SPEAK_LAST_SECONDS)
    if os.environ.get("RONDO_DEBUG") == "1":
        traceback.print_exc()
    print(f"rondo: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr, flush=True)
