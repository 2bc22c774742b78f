"""Which implementation of an operator runs: one choice, logged once, never silent."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
_logged: set[tuple[str, str, str]] = set()
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def full_precision(device: torch.device) -> AbstractContextManager:
    """Keeps autocast from float32 products; the meta device has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def choose(
    operator: str,
    backend: str,
    implementations: Mapping[str, Callable],
    device: torch.device,
    refusal: str | None = None,
    *,
    reason: str = "asked for",
) -> Callable:
    """Returns the implementation of `operator` that `backend` names.

    Args:
        operator: name of the operator, for messages.
        backend: "auto", or a key of `implementations`. "auto" takes triton on a GPU when the
            operator has a kernel that serves this call, else chunked, else reference.
        implementations: backend name -> function; all share one signature. The one for triton
            imports it when it is called.
        device: where the inputs live.
        refusal: why the Triton kernel cannot serve this call, or why there is none; or None.
        reason: why it is this `backend`, for the log, where it is not "auto".

    Raises:
        ValueError: `backend` is unknown, has no implementation, or cannot serve this call.
        ModuleNotFoundError: `backend` is "triton", which is not installed.
    """
    if backend == "auto":
        name, reason = _best(operator, implementations, device.type, refusal)
    else:
        name = backend
    if backend == "triton" and refusal is not None:
        raise ValueError(f"{operator}: backend 'triton' cannot run: {refusal}")
    if name not in implementations:
        raise ValueError(
            f"{operator}: backend {backend!r} is not available; "
            f"choose one of auto, {', '.join(implementations)}"
        )
    if backend == "triton":
        _require_triton(operator, device.type)
    log_once(operator, name, device.type, reason)
    return implementations[name]


def _best(
    operator: str, implementations: Mapping[str, Callable], device: str, refusal: str | None
) -> tuple[str, str]:
    """The implementation that "auto" takes, and why."""
    preferred = ("triton", "chunked", "reference") if device == "cuda" else ("chunked", "reference")
    if device == "cuda":
        if refusal is None and "triton" in implementations and not _has_triton():
            refusal = "triton is not installed"
        if refusal is not None:
            name = next(b for b in preferred[1:] if b in implementations)
            return name, f"triton cannot: {refusal}"
    name = next(b for b in preferred if b in implementations)
    return name, f"first of {', '.join(preferred)} that {operator} has on {device}"


def _require_triton(operator: str, device: str) -> None:
    """Raises what stands against running the Triton kernel."""
    if not _has_triton():
        raise ModuleNotFoundError(
            f"{operator}: backend 'triton' needs the package triton: pip install triton",
            name="triton",
        )
    if device != "cuda" and not (device == "cpu" and _interprets()):
        raise ValueError(
            f"{operator}: backend 'triton' needs CUDA tensors, got {device}; on a CPU it runs in "
            "its interpreter only, slowly, with TRITON_INTERPRET=1 in the environment"
        )


def triton_refusal(*tensors: Tensor | None) -> str | None:
    """Why no Triton kernel takes these tensors, or None."""
    for x in tensors:
        if x is None:
            continue
        if type(x) not in (Tensor, torch.nn.Parameter):  # distributed, or without numbers
            return f"it takes plain tensors, got {type(x).__name__}"
        if x.is_floating_point() and x.dtype not in TRITON_DTYPES:
            taken = ", ".join(str(d).removeprefix("torch.") for d in TRITON_DTYPES)
            return f"it takes {taken}, got {str(x.dtype).removeprefix('torch.')}"
    return None


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _interprets() -> bool:
    """Whether kernels run as numpy: what `triton.jit` saw when it was imported."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def show_choices(say: Callable[[str], None]) -> None:
    """Hands every choice from now on to `say`, as a line."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    logger.handlers[:] = [Handler()]
    logger.setLevel(logging.INFO)
    _logged.clear()


@torch.compiler.assume_constant_result  # so that it does not break a compiled graph
def log_once(operator: str, name: str, device: str, reason: str) -> None:
    """Says what an operator runs on, unless it was said before."""
    if (operator, name, device) not in _logged:
        _logged.add((operator, name, device))
        logger.info("%s runs on backend %s (%s)", operator, name, reason)
