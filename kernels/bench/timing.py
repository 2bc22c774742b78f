"""How long a call takes on a device, and what the device does at best."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rondo.kernels.backend import choices_in
from rondo.kernels.bench.cases import LONGEST, Case, make_case
from rondo.kernels.bench.peers import PEERS

OURS = "ours"


def milliseconds(run: Callable[[], Any], device: torch.device, budget: float = 0.12) -> float:
    """Median time of a call, over as many as take `budget` seconds (two at least), after one that
    compiles."""
    run()
    once = _timed(run, device)
    times = [once, *(_timed(run, device) for _ in range(max(1, min(50, int(1e3 * budget / once)))))]
    return sorted(times)[(len(times) - 1) // 2]


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def ceilings(device: torch.device, size: int = 8192) -> dict[str, float]:
    """Bytes and bfloat16 FLOPs a second that a large copy and a large product reach."""
    x = torch.empty(8 * size * size, dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    a = torch.randn(size, size, device=device).bfloat16()
    copy = milliseconds(lambda: y.copy_(x), device)
    product = milliseconds(lambda: a @ a, device)
    return {"bytes": 2e3 * x.nbytes / copy, "flops": 2e3 * size**3 / product}


def directions(case: Case, call: Callable[..., Tensor], device: torch.device) -> dict[str, float]:
    """Milliseconds of the forward pass alone, and of both."""

    def forward() -> Tensor:
        with torch.no_grad():
            return call(**case.inputs)

    upstream = torch.ones_like(forward())

    def both() -> None:
        torch.autograd.grad(call(**case.inputs), list(case.inputs.values()), upstream)

    return {"forward": milliseconds(forward, device), "both": milliseconds(both, device)}


def _release(device: torch.device) -> None:
    """Gives back memory that nothing holds."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def measure(
    operator: str, preset: str, batch: int, length: int, party: str, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Direction -> milliseconds of ours or of a peer; of ours, bytes, FLOPs and the backend that it
    runs on as well. Leaves no memory behind.

    Raises:
        ImportError: the peer is not installed.
    """
    call = None if party == OURS else PEERS[operator][party]()
    try:
        case = make_case(operator, preset, batch, length, device)
        if call is not None:
            spent = directions(case, lambda **x: call(**x, **case.extra), device)
            return {name: {"milliseconds": x} for name, x in spent.items()}
        spent = directions(case, case.run, device)
        with torch.no_grad():
            output, chosen = choices_in(lambda: case.run(**case.inputs))
        return {
            name: {
                "milliseconds": x,
                "bytes": case.bytes(output, name == "both"),
                "flops": case.flops + (name == "both") * case.backward_flops,
                "backend": ", ".join(dict.fromkeys(name for _, name in chosen)),
            }
            for name, x in spent.items()
        }
    finally:
        case = output = None
        _release(device)


def compile_for(operator: str, preset: str, party: str, device: torch.device) -> None:
    """Runs a case once in both directions at a short length, so that what it compiles lies in the
    cache on disk. Lengths share kernels, but for those of rows that are few and long.

    Raises:
        ImportError: the peer is not installed.
    """
    call = None if party == OURS else PEERS[operator][party]()
    for batch, length in ((8, 2048), (1, 16384)):
        if length > LONGEST.get(operator, length):
            continue
        case = make_case(operator, preset, batch, length, device)
        run = case.run if call is None else (lambda **x: call(**x, **case.extra))  # noqa: B023
        with torch.no_grad():
            run(**case.inputs)
        output = run(**case.inputs)
        torch.autograd.grad(output, list(case.inputs.values()), torch.ones_like(output))
        case = run = output = None
        _release(device)  # other processes test on it meanwhile
