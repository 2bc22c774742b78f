"""Which implementation of an operator runs: one choice, logged once, never silent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

logger = logging.getLogger(__name__)
_logged: set[tuple[str, str, str]] = set()


def full_precision(device: torch.device) -> AbstractContextManager:
    """Keeps autocast from float32 products; the meta device has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def choose(
    operator: str, backend: str, implementations: Mapping[str, Callable], device: torch.device
) -> Callable:
    """Returns the implementation of `operator` that `backend` names.

    Args:
        operator: name of the operator, for messages.
        backend: "auto", or a key of `implementations`. "auto" takes triton on a GPU when the
            operator has a kernel, else chunked, else reference.
        implementations: backend name -> function; all share one signature.
        device: where the inputs live.

    Raises:
        ValueError: `backend` is unknown, has no implementation, or cannot run on `device`.
    """
    if backend == "auto":
        preferred = (
            ("triton", "chunked", "reference")
            if device.type == "cuda"
            else ("chunked", "reference")
        )
        name = next(b for b in preferred if b in implementations)
        reason = f"first of {', '.join(preferred)} that {operator} has on {device.type}"
    else:
        name, reason = backend, "asked for"
    if name not in implementations:
        raise ValueError(
            f"{operator}: backend {backend!r} is not available; "
            f"choose one of auto, {', '.join(implementations)}"
        )
    if name == "triton" and device.type != "cuda":
        raise ValueError(f"{operator}: backend 'triton' needs CUDA tensors, got {device.type}")
    _log_once(operator, name, device.type, reason)
    return implementations[name]


def show_choices(say: Callable[[str], None]) -> None:
    """Hands every choice from now on to `say`, as a line."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    logger.handlers[:] = [Handler()]
    logger.setLevel(logging.INFO)
    _logged.clear()


@torch.compiler.assume_constant_result  # so that it does not break a compiled graph
def _log_once(operator: str, name: str, device: str, reason: str) -> None:
    if (operator, name, device) not in _logged:
        _logged.add((operator, name, device))
        logger.info("%s runs on backend %s (%s)", operator, name, reason)
