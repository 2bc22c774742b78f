"""Small matrices, one a channel, as lists of tensors; one entry is a plain factor."""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels.newton_rnn.cells import Block, State
from rondo.kernels.scan.chunked import scan as diagonal_scan


def product(a: Block, b: Block) -> Block:
    """The matrix a b."""
    columns = list(zip(*b, strict=True))
    return [[_dot(row, column) for column in columns] for row in a]


def apply(a: Block, x: State) -> State:
    """The vector a x."""
    return [_dot(row, x) for row in a]


def transposed(a: Block) -> Block:
    """The transposed matrix."""
    return [list(column) for column in zip(*a, strict=True)]


def added(x: State, y: State) -> State:
    """x + y."""
    return [a + b for a, b in zip(x, y, strict=True)]


def less(x: State, y: State) -> State:
    """x - y."""
    return [a - b for a, b in zip(x, y, strict=True)]


def across(a: Block, reverse: bool = False) -> Block:
    """The product `(B, 1, W)` of matrices `(B, T, W)`, the first one rightmost (in reverse, the
    last one)."""
    while (time := a[0][0].shape[1]) > 1:
        odd = at(a, slice(time - time % 2, time))
        early, late = at(a, slice(0, time - 1, 2)), at(a, slice(1, time, 2))
        a = joined(product(early, late) if reverse else product(late, early), odd)
    return a


def joined(a: Block, b: Block) -> Block:
    """The chunks `(B, chunks, W)` of a, then those of b."""
    if b[0][0].shape[1] == 0:
        return a
    return [
        [torch.cat(pair, 1) for pair in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)
    ]


def each(function: functools.partial[Tensor], a: Block) -> Block:
    """`function` of every entry."""
    return [[function(entry) for entry in row] for row in a]


def flushed(a: Block) -> Block:
    """Without what is so small that its products would lose their normal form: a processor takes
    a hundred times as long for those, and they say nothing any more."""
    least = torch.finfo(a[0][0].dtype).tiny ** 0.5
    return each(functools.partial(F.hardshrink, lambd=least), a)


def scan(a: Block, b: State, first: State, reverse: bool = False) -> State:
    """`x_t = a_t x_{t-1} + b_t` for entries `(B, T, W)`, with `first` `(B, 1, W)` before; or, in
    reverse, `x_t = a_{t+1} x_{t+1} + b_t`, with `first` added to the last position."""
    if b[0].shape[1] == 0:
        return b
    if len(b) == 1:
        return [diagonal_scan(a[0][0], b[0], first[0][:, 0], reverse)]
    return _block_scan(a, b, first, reverse)


def _block_scan(a: Block, b: State, first: State, reverse: bool) -> State:
    """As the diagonal scan: all chunks step together from zero and find products on the way, the
    states at their borders follow each other, and every position adds what its border brings."""
    time = b[0].shape[1]
    chunk = -(-time // math.isqrt(time))
    if reverse:
        a = [[F.pad(x[:, 1:], (0, 0, 0, 1)) for x in row] for row in a]
        b = [torch.cat((x[:, :-1], x[:, -1:] + y), 1) for x, y in zip(b, first, strict=True)]
        first = [torch.zeros_like(x) for x in first]
    steps = range(chunk)[::-1] if reverse else range(chunk)
    x = [_chunked(y, chunk) for y in b]
    states = [[y[:, :, t] for y in x] for t in range(chunk)]
    y = [[_chunked(y, chunk) for y in row] for row in a]
    products = [[[z[:, :, t] for z in row] for row in y] for t in range(chunk)]
    for previous, t in itertools.pairwise(steps):
        states[t] = added(states[t], apply(products[t], states[previous]))
        products[t] = product(products[t], products[previous])
    borders = _borders(products[steps[-1]], states[steps[-1]], first, reverse)
    found = [added(states[t], apply(products[t], borders)) for t in range(chunk)]
    return [torch.stack(y, 2).flatten(1, 2)[:, :time] for y in zip(*found, strict=True)]


def _borders(a: Block, b: State, first: State, reverse: bool) -> State:
    """`(B, chunks, W)`: what comes to each chunk from the one before (in reverse, after) it."""
    count = b[0].shape[1]
    found = [first]
    for t in range(count - 1, 0, -1) if reverse else range(count - 1):
        here = slice(t, t + 1)
        found.append(added(apply(at(a, here), found[-1]), [x[:, here] for x in b]))
    return [torch.cat(x[::-1] if reverse else x, 1) for x in zip(*found, strict=True)]


def _chunked(x: Tensor, chunk: int) -> Tensor:
    """`(B, chunks, chunk, W)`, with zeros behind."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % chunk)).unflatten(1, (-1, chunk))


def at(a: Block, places: slice) -> Block:
    """Some of the matrices `(B, T, W)`."""
    return [[x[:, places] for x in row] for row in a]


def _dot(row: list[Tensor] | tuple[Tensor, ...], column: State | tuple[Tensor, ...]) -> Tensor:
    total = row[0] * column[0]
    for x, y in zip(row[1:], column[1:], strict=True):
        total.addcmul_(x, y)
    return total
