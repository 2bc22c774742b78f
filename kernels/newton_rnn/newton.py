"""Newton's method on the states at the borders of chunks.

Guess the state s_c that every chunk c begins with, and let all chunks step together: a chunk ends
in e_c, and the product P_c of its Jacobians says how that depends on s_c. The guesses are right
when `s_{c+1} = e_c` everywhere. Newton's method for these equations is one linear recurrence over
the borders, `u_{c+1} = P_c u_c + (e_c - s_{c+1})`, and the next guess is `e_c + P_c u_c`.

With chunks of one position this is the iteration of ParaRNN (arXiv 2510.21450) and DEER (arXiv
2309.12252), in which the whole trajectory is guessed. With longer ones (multiple shooting) only
the borders are: all else follows from them exactly, nothing but the borders is kept of an
iteration, and fewer are needed, since a chunk forgets what it began with. After k iterations the
first k + 1 chunks are exact, whatever the Jacobians are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rondo.kernels.backend import log_once
from rondo.kernels.newton_rnn import blocks
from rondo.kernels.newton_rnn.neighbours import Neighbours, Summary, state_of, summary, vector
from rondo.kernels.newton_rnn.sweeps import Rows, Sweep, forward
from rondo.kernels.tiles import has_numbers


class Policy(NamedTuple):
    """When to stop."""

    expected: int
    """Iterations; those beyond are counted."""
    most: int
    """Iterations after which the rows are done one position at a time."""
    tolerance: float
    """Largest residual of a solution, each relative to its own state (at least 1)."""


class Health(NamedTuple):
    """How a solve went: tensors without dimensions."""

    residual: Tensor
    """Largest difference between a state and the step from the state before it."""
    relative: Tensor
    """The largest of these differences when each is divided by its own state or by 1."""
    product: Tensor
    """Largest entry of a chunk's product of Jacobians: how much of what a chunk begins with reaches
    the next one. Above 1 errors grow on their way. 0 for rows of one chunk."""
    iterations: Tensor
    """int64: linear solves."""
    extra: Tensor
    """int64: those beyond the expected ones."""
    sequential: Tensor
    """int64: 1 if Newton's method did not get there. Then the states are those of a loop over
    time, and the residual is the one that was left before it."""


class Found(NamedTuple):
    """A solution."""

    states: Tensor
    """`(N, B, T, W)`."""
    before: Tensor
    """`(N, B, 1, W)`, the state before this stretch."""
    health: Health


class Passes(NamedTuple):
    """How chunks are run, and what goes from one to the next."""

    forward: Callable[[Rows, Tensor, bool], Sweep] = forward
    """As `sweeps.forward`."""
    enter: Callable[[Tensor, Tensor, Tensor], Tensor] = blocks.enter
    """As `blocks.enter`."""


TORCH = Passes()


def solve(
    rows: Rows,
    first: Tensor,
    policy: Policy,
    neighbours: Neighbours | None = None,
    passes: Passes = TORCH,
) -> Found:
    """The states that follow `first` `(N, B, 1, W)`. Here alone it is decided how to go on."""
    borders = guess(rows, first, neighbours)
    if neighbours is None and (borders.shape[2] == 1 or not has_numbers()):
        return Found(passes.forward(rows, borders, False).states, first, no_iterations(first))
    iterations, with_products, largest = 0, True, 0.0
    while True:
        sweep = passes.forward(rows, borders, with_products)
        following, figures = advance(sweep, borders, first, neighbours, passes)
        if neighbours is not None:
            figures = neighbours.agree(figures)
        if has_numbers():
            residual, relative, carried, product, state = figures.tolist()
        else:  # the iterations that are expected
            residual = relative = carried = float(iterations < policy.expected)
            product = state = 1.0
        largest = product if with_products else largest
        # The last end has no gap after it.
        solved = math.isfinite(state) and relative <= policy.tolerance
        if solved or iterations == policy.most:
            break
        iterations += 1
        # Where chunks have forgotten what they began with, the next sweep only confirms it.
        with_products = not with_products or not carried <= policy.tolerance
        borders = following
    counts = (iterations, max(0, iterations - policy.expected), int(not solved))
    health = _health((residual, relative, largest), counts, first)
    if solved:
        return Found(sweep.states, borders[:, :, :1], health)
    why = "Newton's method was not within its tolerance for some rows, which is said once"
    log_once("newton_rnn", "one position at a time", first.device.type, why)
    return Found(*sequential(rows, first, neighbours, passes), health)


def sequential(
    rows: Rows, first: Tensor, neighbours: Neighbours | None, passes: Passes
) -> tuple[Tensor, Tensor]:
    """The states in one chunk, and the one before them: each stretch after the one before it, in
    as many turns as there are stretches."""
    rows = rows._replace(size=rows.gates.shape[1])
    before = _received(neighbours, torch.zeros_like(first), first)
    sweep = passes.forward(rows, before, False)
    for _ in range(0 if neighbours is None else neighbours.count - 1):
        before = _received(neighbours, sweep.ends, first)
        sweep = passes.forward(rows, before, False)
    return sweep.states, before


def guess(rows: Rows, first: Tensor, neighbours: Neighbours | None) -> Tensor:
    """`(N, B, chunks, W)`: what the last position before a chunk makes of a zero state (as in
    ParaRNN); of the first chunk `first`."""
    weights, before = rows.weights.unbind(0), first
    if neighbours is not None:
        last = rows.inputs(slice(-1, None))
        before = _received(
            neighbours, rows.cell.step(torch.zeros_like(first), last, weights), first
        )
    if rows.size >= rows.gates.shape[1]:
        return before
    gates = rows.inputs(rows.ends())
    zero = torch.zeros_like(gates[0]).expand(len(first), *gates[0].shape)
    return torch.cat((before, rows.cell.step(zero, gates, weights)), 2)


def advance(
    sweep: Sweep,
    borders: Tensor,
    first: Tensor,
    neighbours: Neighbours | None,
    passes: Passes = TORCH,
) -> tuple[Tensor, Tensor]:
    """The next borders after a sweep from `borders`, and what to judge by: the residual, absolute
    and relative, the largest correction that a chunk passed on, relative, the largest entry of a
    chunk's product, and the largest state. Relative is to the number itself: a large one must not
    hide what is wrong with others. Without products, a border becomes the end of the chunk before
    it."""
    ends, old, products = sweep.ends, borders[:, :, :1], sweep.products
    if products is None:
        products = torch.zeros_like(ends).expand(len(ends), *ends.shape)
    products = _finite(products)  # one that has overflown says nothing
    gaps = ends[:, :, :-1] - borders[:, :, 1:]
    arrived, change = old, torch.zeros_like(old)
    if neighbours is not None:
        here = _stretch(products, ends + _carried(products, gaps, change, passes), old)
        arrived = state_of(neighbours.before(here, vector(first)))
        change = arrived - old
    carried = _carried(products, gaps, _finite(change), passes)
    following = torch.cat((_finite(arrived), (ends + carried)[:, :, :-1]), 2)
    if neighbours is None:  # nothing follows the last chunk
        carried, products = carried[:, :, :-1], products[:, :, :, :-1]
    wrong = torch.cat((change, gaps), 2)
    sizes = _size(torch.cat((arrived, ends), 2))  # of the borders, and of the last end
    shares = wrong / sizes[:, :, :-1], carried / sizes[:, :, 1 : carried.shape[2] + 1]
    return following, torch.stack([x.abs().amax() for x in (wrong, *shares, products, ends)])


def _size(x: Tensor) -> Tensor:
    return x.abs().clamp(min=1.0)


def _stretch(products: Tensor, ends: Tensor, old: Tensor) -> Summary:
    """The map from the state before a stretch, now `old`, to the one after it. Where it overflows
    it is the end that was found, whatever comes: that is right once `old` is."""
    through, end = _finite(blocks.across(products)), _finite(ends[:, :, -1:])
    rest = end - blocks.apply(through, old)
    known = rest.isfinite().all(0)
    return summary(torch.where(known, through, 0.0), torch.where(known, rest, end))


def _carried(products: Tensor, gaps: Tensor, change: Tensor, passes: Passes) -> Tensor:
    """`(N, B, chunks, W)`: what each chunk hands on of its border's correction, of which the first
    is `change`."""
    return _finite(blocks.apply(products, passes.enter(products, gaps, change)))


def _received(neighbours: Neighbours | None, end: Tensor, first: Tensor) -> Tensor:
    """`first`, or the end `(N, B, 1, W)` of the stretch before."""
    if neighbours is None:
        return first
    nothing = torch.zeros_like(end).expand(len(end), *end.shape)
    return state_of(neighbours.before(summary(nothing, end), vector(first)))


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, 0.0, 0.0, 0.0)


def no_iterations(like: Tensor) -> Health:
    """Of states that follow each other, on the device of `like`."""
    return _health((0.0, 0.0, 0.0), (0, 0, 0), like)


def _health(numbers: tuple[float, ...], counts: tuple[int, ...], like: Tensor) -> Health:
    both = torch.tensor((*numbers, *counts), dtype=torch.float32, device=like.device)  # one copy
    return Health(*both[: len(numbers)].unbind(), *both[len(numbers) :].long().unbind())
