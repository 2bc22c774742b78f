"""The cells of `nonlinear_rnn`, in place: a step, and its derivative.

A cell keeps, of every position, parts `(H, B, P, D)`: they hold what inputs, state and biases add
up to and are overwritten with what the backward pass needs. The state's product is added to the
first parts, before the step. Slopes are made for many positions at once; what is left for the loop
backwards are a few products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rondo.kernels.hyperbolic import tanh

_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class Cell:
    """What the loop asks of a cell. States are `(H, B, D)` each, h first."""

    name: ClassVar[str]
    gates: ClassVar[tuple[str, ...]]
    """Of the inputs and of the recurrent weights."""
    biases: ClassVar[tuple[str, ...]]
    states: ClassVar[tuple[str, ...]]
    inputs: ClassVar[tuple[int | None, ...]]
    """Of each part, its gate in the inputs."""
    offsets: ClassVar[tuple[int, ...]]
    """Of each part, its bias."""
    products: ClassVar[tuple[int, ...]]
    """Of the first parts, their gate in the recurrent weights."""
    fresh: ClassVar[tuple[float, ...]]
    """The states before a document."""
    constants: ClassVar[tuple[int, ...]] = ()
    """States that no gradient passes through."""

    def begin(self, states: Tensor) -> None:
        """Puts what the loop works with in place of states `(S, H, B, D)` as they are given."""

    def views(self, parts: Tensor) -> list[tuple[Tensor, ...]]:
        """What `step` needs of the parts `(T, H, B, P, D)`, for each position."""
        raise NotImplementedError

    def step(self, x: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Makes the states `after` of those `before`, and the parts ready for `slopes`."""
        raise NotImplementedError

    def slopes(self, parts: Tensor, before: Tensor, after: Tensor) -> list[tuple[Tensor, ...]]:
        """What `pull` needs, for each of some positions: parts `(T, H, B, P, D)`, states
        `(S, T, H, B, D)`."""
        raise NotImplementedError

    def outs(self, dparts: Tensor) -> list[Any]:
        """What `pull` writes to of the gradients of the parts, for each position."""
        raise NotImplementedError

    def pull(self, dh: Tensor, carry: Sequence[Tensor], slopes: Any, out: Any) -> None:
        """Writes gradients of the parts and moves `carry`, those of the states `(H, B, 1, D)`,
        from after the step to before it. `dh` `(H, B, 1, D)` is the gradient of h without
        `carry[0]` and may be used up; what goes through the product is not in `carry`."""
        raise NotImplementedError


class LSTM(Cell):
    """c' = σ(f) c + σ(i) tanh(z), h' = σ(o) tanh(c'). Parts o, i, f, z."""

    name = "lstm"
    gates = biases = ("i", "f", "z", "o")
    states = ("h", "c")
    inputs = offsets = products = (3, 0, 1, 2)
    fresh = (0.0, 0.0)

    def views(self, parts: Tensor) -> list[tuple[Tensor, ...]]:
        return _by_position(parts[..., :3, :], *parts.unbind(3))

    def step(self, x: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        (oif, o, i, f, z), (h, c) = x, after
        oif.sigmoid_()
        torch.mul(f, before[1], out=c).addcmul_(i, z.tanh_())
        torch.tanh(c, out=h).mul_(o)

    def slopes(self, parts: Tensor, before: Tensor, after: Tensor) -> list[tuple[Tensor, ...]]:
        slopes = torch.empty_like(parts)
        o, i, f, z = parts.unbind(3)
        by_o, by_i, by_f, by_z = slopes.unbind(3)
        shown = tanh(after[1])
        _through_sigmoid(shown, o, out=by_o)
        _through_sigmoid(z, i, out=by_i)
        _through_sigmoid(before[1], f, out=by_f)
        _tanh_backward(i, z, grad_input=by_z)
        by_c = _tanh_backward(o, shown, grad_input=torch.empty_like(shown))
        return _by_position(slopes[..., :1, :], slopes[..., 1:, :], _wide(by_c), _wide(f))

    def outs(self, dparts: Tensor) -> list[Any]:
        return _by_position(dparts[..., :1, :], dparts[..., 1:, :])

    def pull(self, dh: Tensor, carry: Sequence[Tensor], slopes: Any, out: Any) -> None:
        (by_o, by_ifz, by_c, f), (to_o, to_ifz) = slopes, out
        dc = carry[1].addcmul_(dh, by_c)
        torch.mul(dh, by_o, out=to_o)
        torch.mul(dc, by_ifz, out=to_ifz)
        dc.mul_(f)


class GRU(Cell):
    """h' = z h + (1 - z) tanh(n + r g). Parts r, z, g (the state's share of n), n."""

    name = "gru"
    gates = ("r", "z", "n")
    biases = ("r", "z", "n", "h")
    states = ("h",)
    inputs = (0, 1, None, 2)
    offsets = (0, 1, 3, 2)
    products = (0, 1, 2)
    fresh = (0.0,)

    def views(self, parts: Tensor) -> list[tuple[Tensor, ...]]:
        return _by_position(parts[..., :2, :], *parts.unbind(3))

    def step(self, x: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        rz, r, z, g, n = x
        rz.sigmoid_()
        torch.lerp(n.addcmul_(r, g).tanh_(), before[0], z, out=after[0])

    def slopes(self, parts: Tensor, before: Tensor, after: Tensor) -> list[tuple[Tensor, ...]]:
        slopes = torch.empty_like(parts)
        r, z, g, n = parts.unbind(3)
        by_r, by_z, by_g, by_n = slopes.unbind(3)
        _through_sigmoid(before[0] - n, z, out=by_z)
        _tanh_backward(1 - z, n, grad_input=by_n)
        _through_sigmoid(g * by_n, r, out=by_r)
        torch.mul(r, by_n, out=by_g)
        return _by_position(slopes, _wide(z))

    def outs(self, dparts: Tensor) -> list[Any]:
        return list(dparts.unbind(0))

    def pull(self, dh: Tensor, carry: Sequence[Tensor], slopes: Any, out: Any) -> None:
        by_parts, z = slopes
        dh.add_(carry[0])
        torch.mul(dh, by_parts, out=out)
        torch.mul(dh, z, out=carry[0])


class Elman(Cell):
    """h' = tanh(n)."""

    name = "elman"
    gates = biases = ("n",)
    states = ("h",)
    inputs = offsets = products = (0,)
    fresh = (0.0,)

    def views(self, parts: Tensor) -> list[tuple[Tensor, ...]]:
        return _by_position(parts.squeeze(3))

    def step(self, x: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        torch.tanh(x[0], out=after[0])

    def slopes(self, parts: Tensor, before: Tensor, after: Tensor) -> list[tuple[Tensor, ...]]:
        return _by_position(_wide(1 - after[0].square()))

    def outs(self, dparts: Tensor) -> list[Any]:
        return list(dparts.unbind(0))

    def pull(self, dh: Tensor, carry: Sequence[Tensor], slopes: Any, out: Any) -> None:
        torch.mul(dh, slopes[0], out=out)


class SLSTM(Cell):
    """c' = f c + i tanh(z), n' = f n + i, h' = σ(o) c' / n' with i and f relative to exp(m').

    Parts o, z, i, f; those of i and f stay as they are. Before a document m is -inf.
    """

    name = "slstm"
    gates = biases = ("i", "f", "z", "o")
    states = ("h", "c", "n", "m")
    inputs = offsets = products = (3, 2, 0, 1)
    fresh = (0.0, 0.0, 0.0, -torch.inf)
    constants = (3,)

    def begin(self, states: Tensor) -> None:
        states[3].masked_fill_(states[2] == 0, -torch.inf)

    def views(self, parts: Tensor) -> list[tuple[Tensor, ...]]:
        return _by_position(*parts.unbind(3))

    def step(self, x: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        (o, z, i, f), (h, c, n, m) = x, after
        forget = F.logsigmoid(f).add_(before[3])
        torch.maximum(i, forget, out=m)
        forget.sub_(m).exp_()
        write = torch.sub(i, m, out=h).exp_()
        torch.mul(forget, before[2], out=n).add_(write)
        torch.mul(forget, before[1], out=c).addcmul_(write, z.tanh_())
        torch.div(c, n, out=h).mul_(o.sigmoid_())

    def slopes(self, parts: Tensor, before: Tensor, after: Tensor) -> list[tuple[Tensor, ...]]:
        o, z, i, f = parts.unbind(3)
        _, c, n, m = after
        slopes = torch.empty_like(parts)
        by_o, by_z, by_i, by_f = slopes.unbind(3)
        by_n = torch.empty_like(parts[..., 2:, :])
        forget = F.logsigmoid(f).add_(before[3]).sub_(m).exp_()
        write = torch.sub(i, m).exp_()
        ratio = c / n
        _through_sigmoid(ratio, o, out=by_o)
        _tanh_backward(write, z, grad_input=by_z)
        torch.mul(write, z, out=by_i)
        slope = torch.sigmoid(-f).mul_(forget)
        torch.mul(slope, before[1], out=by_f)
        by_n[..., 0, :] = write
        torch.mul(slope, before[2], out=by_n[..., 1, :])
        to_c = o / n
        wide = (_wide(x) for x in (to_c, -ratio * to_c, forget))
        return _by_position(slopes[..., :1, :], slopes[..., 1:, :], by_n, *wide)

    def outs(self, dparts: Tensor) -> list[Any]:
        return _by_position(*(dparts[..., part, :] for part in map(slice, (0, 1, 2), (1, 4, 4))))

    def pull(self, dh: Tensor, carry: Sequence[Tensor], slopes: Any, out: Any) -> None:
        (by_o, by_zif, by_if, to_c, to_n, forget), (to_o, to_zif, to_if) = slopes, out
        dc, dn = carry[1].addcmul_(dh, to_c), carry[2].addcmul_(dh, to_n)
        torch.mul(dh, by_o, out=to_o)
        torch.mul(dc, by_zif, out=to_zif)
        to_if.addcmul_(dn, by_if)
        dc.mul_(forget)
        dn.mul_(forget)


def _through_sigmoid(grad: Tensor, y: Tensor, out: Tensor) -> None:
    """`grad y (1 - y)`."""
    torch.mul(grad, y, out=out).addcmul_(out, y, value=-1.0)


def _by_position(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of tensors `(T, ...)`, position by position: made at once, they cost the loop less."""
    return list(zip(*(x.unbind(0) for x in tensors), strict=True))


def _wide(x: Tensor) -> Tensor:
    return x.unsqueeze(3)


CELLS: dict[str, Cell] = {cell.name: cell for cell in (LSTM(), GRU(), Elman(), SLSTM())}
"""Cells by name."""
