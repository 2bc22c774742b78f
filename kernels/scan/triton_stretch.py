"""The linear scan by Triton kernels where the state before the row comes later (`kernels.stretch`).

What chunks do to any state is found once, and serves the summary and the states that enter them;
so it is on the way back. Rows that would be one chunk are read twice: to write their states down
in float32, and what is left of the state that comes, would move more bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rondo.kernels.scan.triton import backward_pass, forward_pass
from rondo.kernels.scan.triton_calls import (
    borders,
    chunk_maps,
    contiguous,
    cut_rows,
    maps_like,
    scan_gradients,
    scan_outputs,
)
from rondo.kernels.stretch import Steps, stretch
from rondo.kernels.summary import DiagonalSummary, Stretch
from rondo.kernels.triton_configs import Config
from rondo.kernels.triton_support import launch, opaque


def begin_stretch(a: Tensor, b: Tensor, segment_ids: Tensor | None) -> Stretch:
    """Checked arguments of `linear_scan_stretch`."""
    a, b = (x.reshape(*b.shape[:2], -1) for x in (a, b))
    return stretch(_STEPS, DiagonalSummary, (a, b, segment_ids), ())


def _fake_begin(
    a: Tensor, b: Tensor, ids: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    state = a.new_empty(a.shape[0], a.shape[2], dtype=torch.float32)
    return torch.empty_like(state), state, maps_like(a, cut_rows(a))


@opaque("triton_linear_scan_begin", _fake_begin)
def _maps(a: Tensor, b: Tensor, ids: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What the row does to any state, and what its chunks do."""
    transition, state, maps = _fake_begin(a, b, ids, reverse)
    a, b, ids = contiguous(a, b, ids)

    def start(config: Config) -> None:
        chunk_maps(a, b, ids, reverse, cut_rows(a), maps, config)
        borders(maps, None, None, (transition, state), reverse, config)

    if a.numel():
        name = "linear_scan_backward" if reverse else "linear_scan"
        launch(name, "*", a, (a.shape[2], "summary"), start)
    return transition, state, maps


def _fake_finish(first: Tensor, maps: Tensor, a: Tensor, b: Tensor, ids: Tensor | None) -> Tensor:
    return b.new_empty(b.shape)


@opaque("triton_linear_scan_finish", _fake_finish)
def _finish(first: Tensor, maps: Tensor, a: Tensor, b: Tensor, ids: Tensor | None) -> Tensor:
    h = b.new_empty(b.shape)
    last = torch.empty_like(first)
    a, b, ids, first = contiguous(a, b, ids, first)

    def start(config: Config) -> None:
        incoming = torch.empty_like(maps[0])
        borders(maps, first, incoming, (None, None), False, config)
        scan_outputs(a, b, ids, incoming, (h, last), cut_rows(a), config)

    if a.numel():
        launch("linear_scan", "*", a, (a.shape[2], "outputs"), start)
    return h


def _begin(a: Tensor, b: Tensor, ids: Tensor | None) -> tuple[Tensor, ...]:
    return _maps(a, b, ids, False)


def _reverse(
    first: Tensor, dh: Tensor, h: Tensor, a: Tensor, b: Tensor, ids: Tensor | None
) -> tuple[Tensor, ...]:
    _, state, maps = _maps(a, dh, ids, True)
    return state * a[:, 0], maps, dh, h, first


def _shapes(
    state: Tensor, maps: Tensor, a: Tensor, b: Tensor, ids: Tensor | None
) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    return tuple((x.shape, x.dtype) for x in (maps, b, b, state))


def _fake_gradients(
    dstate: Tensor | None,
    maps: Tensor,
    dh: Tensor,
    h: Tensor,
    first: Tensor,
    a: Tensor,
    ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), h.new_empty(h.shape)


@opaque("triton_linear_scan_stretch_gradients", _fake_gradients)
def _all_gradients(
    dstate: Tensor | None,
    maps: Tensor,
    dh: Tensor,
    h: Tensor,
    first: Tensor,
    a: Tensor,
    ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    results = _fake_gradients(dstate, maps, dh, h, first, a, ids)
    written = (*results, torch.empty_like(first))
    dstate, dh, h, first, a, ids = contiguous(dstate, dh, h, first, a, ids)

    def start(config: Config) -> None:
        incoming = torch.empty_like(maps[0])
        borders(maps, dstate, incoming, (None, None), True, config)
        scan_gradients(a, h, first, ids, dh, incoming, written, cut_rows(a), config)

    if a.numel():
        launch("linear_scan_backward", "*", a, (a.shape[2], "outputs"), start)
    return results


def _gradients(
    dstate: Tensor | None,
    maps: Tensor | None,
    dh: Tensor | None,
    h: Tensor | None,
    first: Tensor | None,
    a: Tensor,
    b: Tensor,
    ids: Tensor | None,
) -> tuple[Tensor, Tensor, None]:
    if maps is None or dh is None or h is None or first is None:  # of the state at the end alone
        h, _ = forward_pass(a, b, None, ids)
        grad_a, grad_b, _ = backward_pass(a, h, None, ids, None, dstate)
        return grad_a, grad_b, None
    return *_all_gradients(dstate, maps, dh, h, first, a, ids), None


_STEPS = Steps(_begin, _finish, _reverse, _gradients, _shapes, kept=1, saved=0, outputs=True)
