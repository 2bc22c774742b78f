"""Small matrices, one a channel: `(N, N, B, T, W)`, and vectors `(N, B, T, W)`.

N is the number of a cell's state variables: for one, a matrix is a plain factor.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels.scan.chunked import scan as diagonal_scan


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix a b."""
    total = a[:, :1] * b[:1]
    for j in range(1, len(a)):
        total.addcmul_(a[:, j : j + 1], b[j : j + 1])
    return total


def apply(a: Tensor, x: Tensor) -> Tensor:
    """The vector a x."""
    return product(a, x.unsqueeze(1)).squeeze(1)


def accumulate(total: Tensor, a: Tensor, x: Tensor) -> None:
    """Adds a x to a vector, in place."""
    for column, y in zip(a.unbind(1), x, strict=True):
        total.addcmul_(column, y)


def across(a: Tensor, reverse: bool = False) -> Tensor:
    """`(N, N, B, 1, W)`: the product over time, the first one rightmost (in reverse, the last)."""
    while (time := a.shape[3]) > 1:
        early, late = a[:, :, :, : time - 1 : 2], a[:, :, :, 1::2]
        pairs = product(early, late) if reverse else product(late, early)
        a = torch.cat((pairs, a[:, :, :, time - time % 2 :]), 3)
    return a


def flushed(a: Tensor) -> Tensor:
    """Without what is so small that its products would lose their normal form: a processor takes
    many times as long for those, and they say nothing any more."""
    return F.hardshrink(a, torch.finfo(a.dtype).tiny ** 0.5)


def scan(a: Tensor, b: Tensor, first: Tensor, reverse: bool = False) -> Tensor:
    """`x_t = a_t x_{t-1} + b_t` with `first` `(N, B, 1, W)` before position 0; or, in reverse,
    `x_t = a_{t+1} x_{t+1} + b_t` with `first` added to the last position."""
    if b.shape[2] == 0:
        return b
    if len(b) == 1:
        return diagonal_scan(a[0, 0], b[0], first[0, :, 0], reverse).unsqueeze(0)
    if reverse:
        return _block_scan(a, b, first)
    first = apply(a[:, :, :, :1], first)
    return _block_scan(a.flip(3).roll(1, 3), b.flip(2), first).flip(2)


def enter(a: Tensor, rest: Tensor, first: Tensor) -> Tensor:
    """What comes to each position when `first` comes to position 0, and each hands on a times that
    plus `rest`, `(N, B, T - 1, W)`: to the last one nothing is after."""
    return torch.cat((first, scan(a[:, :, :, :-1], rest, first)), 2)


def _block_scan(a: Tensor, b: Tensor, last: Tensor) -> Tensor:
    """`x_t = a_{t+1} x_{t+1} + b_t`, as the diagonal scan does it: all chunks step together from
    zero and find products on the way, what goes from chunk to chunk follows, and every position
    adds what comes to its chunk."""
    time = b.shape[2]
    chunk = 2 ** (math.isqrt(time - 1).bit_length())
    short = -time % chunk
    x = F.pad(b, (0, 0, 0, short)) if short else b.clone()
    x[:, :, time - 1] += last[:, :, 0]
    a = F.pad(a, (0, 0, 0, short)) if short else a
    a, x = a.unflatten(3, (-1, chunk)), x.unflatten(2, (-1, chunk))
    factors, states = a.unbind(4), x.unbind(3)
    products = []
    for t in range(chunk - 2, -1, -1):
        accumulate(states[t], factors[t + 1], states[t + 1])
        products.append(product(factors[t + 1], products[-1]) if products else factors[t + 1])
    incoming = torch.zeros_like(states[0])
    for c in range(incoming.shape[2] - 1, 0, -1):
        here = slice(c, c + 1)
        start = states[0][:, :, here].clone()
        if products:
            accumulate(start, products[-1][:, :, :, here], incoming[:, :, here])
        incoming[:, :, c - 1 : c] = apply(factors[0][:, :, :, here], start)
    states[-1].add_(incoming)
    for t, through in enumerate(reversed(products)):
        accumulate(states[t], through, incoming)
    return x.flatten(2, 3)[:, :, :time]
