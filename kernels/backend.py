"""Which implementation of an operator runs: one choice, logged once, never silent."""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
logger = logging.getLogger(__name__)
_logged: dict[tuple[str, str, str], None] = {}
"""What was said, in order: operator, backend, device."""
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MISCOMPILING = (3, 4, 0), (3, 7, 1)
"""The first version of Triton that transposes sums of products wrongly on Hopper, and the first
that does not (flash-linear-attention issue 640)."""


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
    doubt: str | None = None,
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
        doubt: why what the Triton kernel gives may be wrong here, or None: "auto" then does not
            take it, and the log warns.
        reason: why it is this `backend`, for the log, where it is not "auto".

    Raises:
        ValueError: `backend` is unknown, has no implementation, or cannot serve this call.
        ModuleNotFoundError: `backend` is "triton", which is not installed.
    """
    if backend == "auto":
        name, reason = _best(operator, implementations, device.type, refusal or doubt)
    else:
        name = backend
        if backend == "triton" and doubt is not None:
            reason = f"asked for, although {doubt}"
    if backend == "triton" and refusal is not None:
        raise ValueError(f"{operator}: backend 'triton' cannot run: {refusal}")
    if name not in implementations:
        raise ValueError(
            f"{operator}: backend {backend!r} is not available; "
            f"choose one of auto, {', '.join(implementations)}"
        )
    if backend == "triton":
        _require_triton(operator, device.type)
    decided = doubt is not None and refusal is None
    log_once(operator, name, device.type, reason, warn=decided)
    return implementations[name]


def choose_recurrence(
    operator: str,
    backend: str,
    implementations: Mapping[str, Callable],
    device: torch.device,
    refusal: str | None,
) -> Callable:
    """`choose`, for kernels that multiply within chunks, which `triton_doubt` is about."""
    doubt = triton_doubt(device) if backend in ("auto", "triton") else None
    return choose(operator, backend, implementations, device, refusal, doubt=doubt)


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
def triton_doubt(device: torch.device) -> str | None:
    """Why the gradients of a chunked recurrence's Triton kernels may be wrong on `device`, or None:
    some versions read the operands of a transposed product wrongly on Hopper, in silence."""
    if not (is_hopper(device) and _has_triton()):
        return None
    version = _triton_version()
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    first, repaired = MISCOMPILING
    if not first <= numbers < repaired:
        return None
    return (
        f"triton {version} is known to make wrong gradients of such kernels on Hopper GPUs "
        "(flash-linear-attention issue 640): update to "
        f"{'.'.join(map(str, repaired))} or later, or ask for backend 'triton' all the same"
    )


def is_hopper(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU of compute capability 9; AMD's chips have numbers like it."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return _is_installed("triton")


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _triton_version() -> str:
    import triton

    return triton.__version__


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


def choices_in(run: Callable[[], T]) -> tuple[T, list[tuple[str, str]]]:
    """What `run()` returns, and the operators that it calls, in order, each with what it runs
    on."""
    before = dict(_logged)
    _logged.clear()
    try:
        result = run()
        return result, [(operator, name) for operator, name, _ in _logged]
    finally:
        _logged.update(before)


@torch.compiler.assume_constant_result  # so that it does not break a compiled graph
def log_once(operator: str, name: str, device: str, reason: str, warn: bool = False) -> None:
    """Says what an operator runs on, unless it was said before."""
    if (operator, name, device) not in _logged:
        _logged[operator, name, device] = None
        level = logging.WARNING if warn else logging.INFO
        logger.log(level, "%s runs on backend %s (%s)", operator, name, reason)
