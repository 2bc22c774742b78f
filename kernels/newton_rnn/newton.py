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

from typing import NamedTuple

import torch
from torch import Tensor

from rondo.kernels.newton_rnn import blocks
from rondo.kernels.newton_rnn.cells import Block, State
from rondo.kernels.newton_rnn.neighbours import Neighbours, state_of, summary, vector
from rondo.kernels.newton_rnn.sweeps import Rows, Sweep, forward
from rondo.kernels.tiles import has_numbers


class Policy(NamedTuple):
    """When to stop."""

    expected: int
    """Iterations; those beyond are counted."""
    most: int
    """Iterations after which the rows are done one position at a time."""
    tolerance: float
    """Largest residual of a solution, relative to the largest state (at least 1)."""


class Health(NamedTuple):
    """How a solve went: tensors without dimensions."""

    residual: Tensor
    """Largest difference between a state and the step from the state before it."""
    relative: Tensor
    """The same, divided by the largest state or by 1."""
    product: Tensor
    """Largest entry of a chunk's product of Jacobians: how much of what a chunk begins with is left
    at its end. Above 1 errors grow on their way. 0 for rows of one chunk."""
    iterations: Tensor
    """int64: linear solves."""
    extra: Tensor
    """int64: those beyond the expected ones."""
    sequential: Tensor
    """int64: 1 if Newton's method did not get there. Then the states are those of a loop over
    time, and the residual is the one that was left before it."""


class Found(NamedTuple):
    """A solution."""

    states: State
    """`(B, T, W)`."""
    before: State
    """`(B, 1, W)`, the state before this stretch."""
    health: Health


def solve(rows: Rows, first: State, policy: Policy, neighbours: Neighbours | None = None) -> Found:
    """The states that follow `first` `(B, 1, W)`. Here alone it is decided how to go on."""
    borders = guess(rows, first, neighbours)
    if neighbours is None and (borders[0].shape[1] == 1 or not has_numbers()):
        states = forward(rows, borders, False).states
        return Found(states, first, no_iterations(rows.weights))
    iterations, with_products, largest = 0, True, 0.0
    while True:
        sweep = forward(rows, borders, with_products)
        following, figures = advance(sweep, borders, first, neighbours)
        if neighbours is not None:
            figures = neighbours.agree(figures)
        residual, scale, carried, product = figures.tolist()
        scale = max(1.0, scale)
        largest = product if with_products else largest
        solved = residual <= policy.tolerance * scale
        if solved or iterations == policy.most:
            break
        iterations += 1
        # Where chunks have forgotten what they began with, the next sweep only confirms it.
        with_products = not with_products or not carried <= policy.tolerance * scale
        borders = following
    counts = (iterations, max(0, iterations - policy.expected), int(not solved))
    health = _health((residual, residual / scale, largest), counts, first[0])
    if solved:
        return Found(sweep.states, [x[:, :1] for x in borders], health)
    return Found(*sequential(rows, first, neighbours), health)


def sequential(rows: Rows, first: State, neighbours: Neighbours | None) -> tuple[State, State]:
    """The states in one chunk, and the one before them: each stretch after the one before it, in
    as many turns as there are stretches."""
    rows = rows._replace(size=rows.gates.shape[1])
    before = _received(neighbours, [torch.zeros_like(x) for x in first], first)
    sweep = forward(rows, before, False)
    for _ in range(0 if neighbours is None else neighbours.count - 1):
        before = _received(neighbours, sweep.ends, first)
        sweep = forward(rows, before, False)
    return sweep.states, before


def guess(rows: Rows, first: State, neighbours: Neighbours | None) -> State:
    """`(B, chunks, W)`: what the last position before a chunk makes of a zero state (as in
    ParaRNN); of the first chunk `first`."""
    zero = [torch.zeros_like(x) for x in first]
    weights = rows.weights.unbind(0)
    before = first
    if neighbours is not None:
        last = rows.cell.step(zero, rows.inputs(slice(-1, None)), weights)
        before = _received(neighbours, last, first)
    if rows.size >= rows.gates.shape[1]:
        return before
    others = rows.cell.step(zero, rows.inputs(rows.ends()), weights)
    return [torch.cat(pair, 1) for pair in zip(before, others, strict=True)]


def advance(
    sweep: Sweep, borders: State, first: State, neighbours: Neighbours | None
) -> tuple[State, Tensor]:
    """The next borders after a sweep from `borders`, and what to judge by: the residual, the
    largest state, the largest correction that a chunk passed on, and the largest entry of a
    chunk's product. Without products, a border becomes the end of the chunk before it."""
    ends, old = sweep.ends, [x[:, :1] for x in borders]
    if sweep.products is None:
        products = [[torch.zeros_like(x) for _ in ends] for x in ends]
    else:  # one that has overflown says nothing
        products = [[torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in row] for row in sweep.products]
    gaps = blocks.less([x[:, :-1] for x in ends], [x[:, 1:] for x in borders])
    change = [torch.zeros_like(x) for x in old]
    if neighbours is not None:
        end = [x[:, -1:] for x in blocks.added(ends, _carried(products, gaps, change))]
        through = blocks.across(products)
        here = summary(through, blocks.less(end, blocks.apply(through, old)))
        change = blocks.less(state_of(neighbours.before(here, vector(first))), old)
    carried = _carried(products, gaps, change)
    following = [
        torch.cat((s + u, (e + more)[:, :-1]), 1)
        for s, u, e, more in zip(old, change, ends, carried, strict=True)
    ]
    wrong = [torch.cat(pair, 1) for pair in zip(change, gaps, strict=True)]
    figures = (wrong, ends, carried, [x for row in products for x in row])
    return following, torch.stack([torch.stack(x).abs().amax() for x in figures])


def _carried(products: Block, gaps: State, change: State) -> State:
    """`(B, chunks, W)`: what each chunk hands on of its border's correction, of which the first
    is `change`."""
    early = [[x[:, :-1] for x in row] for row in products]
    corrections = blocks.scan(early, gaps, change)
    corrections = [torch.cat(pair, 1) for pair in zip(change, corrections, strict=True)]
    return [torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in blocks.apply(products, corrections)]


def _received(neighbours: Neighbours | None, ends: State, first: State) -> State:
    """`first`, or the end `(B, 1, W)` of the stretch before."""
    if neighbours is None:
        return first
    nothing = [[torch.zeros_like(x) for _ in ends] for x in ends]
    return state_of(neighbours.before(summary(nothing, ends), vector(first)))


def no_iterations(like: Tensor) -> Health:
    """Of states that follow each other, on the device of `like`."""
    return _health((0.0, 0.0, 0.0), (0, 0, 0), like)


def _health(numbers: tuple[float, ...], counts: tuple[int, ...], like: Tensor) -> Health:
    device, dtype = like.device, torch.float32
    return Health(
        *(torch.tensor(x, dtype=dtype, device=device) for x in numbers),
        *(torch.tensor(x, device=device) for x in counts),
    )
