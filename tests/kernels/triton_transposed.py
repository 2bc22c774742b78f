"""Finds sums of products that a Triton kernel transposes for another product.

Reported to come out wrong on Hopper by Triton 3.2.0 (triton issue 6124) and 3.4.0 to 3.7.0
(flash-linear-attention issue 640). It takes three things: the result of `tl.dot`, or what casts and
elementwise work make of it, in the registers where tensor cores left it; `tl.trans` of that, which
gives the registers another layout and moves nothing; and a product that takes the result for an
operand. One that went through memory in between is right. The reports are of halves in tiles of
64 x 64; here products of every dtype and size count, and all that is made of a sum, by reductions
too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from rondo.kernels.triton_support import dot, narrow

_MEMORY = ("tt.load", "tt.descriptor_load", "tt.atomic_rmw", "tt.atomic_cas")


class Transposed(NamedTuple):
    """Operands of products, by their types."""

    sums: list[str]
    """Made from a sum of products and transposed on the way."""
    any: list[str]
    """Transposed in registers, whatever they are made from."""


class Flow:
    """Which value of a module is made from which, in registers: over loops and branches, and not
    through memory."""

    def __init__(self, module: Any) -> None:
        self.operations: list[Any] = []
        module.walk(self.operations.append)
        self.into: dict[int, set[int]] = defaultdict(set)
        """Value -> those made from it; results of products are made from nothing."""
        self.ends: dict[int, Any] = {}
        """Region -> its terminator."""
        for operation in self.operations:  # what is within a region comes before its owner
            name = operation.get_name()
            if name in ("scf.yield", "scf.condition"):
                self.ends[operation.get_block().get_parent().id()] = operation
            elif name == "scf.for":
                self._for(operation)
            elif name == "scf.if":
                for region in range(operation.get_num_regions()):
                    self._join(self._yielded(operation, region), [results(operation)])
            elif name == "scf.while":
                self._while(operation)
            elif name != "tt.dot" and name not in _MEMORY:
                for operand in operands(operation):
                    self.into[operand].update(results(operation))

    def _for(self, operation: Any) -> None:
        yielded = self._yielded(operation, 0)
        if yielded:
            block = self.ends[operation.get_region(0).id()].get_block()
            carried = [block.get_argument(i + 1).id() for i in range(len(yielded))]
            for values in (operands(operation)[3 : 3 + len(yielded)], yielded):
                self._join(values, [carried, results(operation)])

    def _while(self, operation: Any) -> None:
        condition, end = (self.ends[operation.get_region(i).id()] for i in (0, 1))
        first, second = arguments(condition.get_block()), arguments(end.get_block())
        self._join(operands(operation), [first])
        self._join(operands(end), [first])
        self._join(operands(condition)[1:], [second, results(operation)])

    def _yielded(self, operation: Any, region: int) -> list[int]:
        end = self.ends.get(operation.get_region(region).id())
        return [] if end is None else operands(end)

    def _join(self, values: list[int], others: list[list[int]]) -> None:
        for other in others:
            for value, made in zip(values, other, strict=True):
                self.into[value].add(made)

    def reached(self, values: Iterable[int]) -> set[int]:
        """The values and all that is made from them."""
        found: set[int] = set()
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            if value not in found:
                found.add(value)
                waiting += self.into[value]
        return found


def operands(operation: Any) -> list[int]:
    """Their numbers."""
    return [operation.get_operand(i).id() for i in range(operation.get_num_operands())]


def results(operation: Any) -> list[int]:
    """Their numbers."""
    return [operation.get_result(i).id() for i in range(operation.get_num_results())]


def arguments(block: Any) -> list[int]:
    """Their numbers."""
    return [block.get_argument(i).id() for i in range(block.get_num_arguments())]


def transposed(module: Any) -> Transposed:
    """The operands of a kernel's products that it transposes."""
    flow = Flow(module)
    named = defaultdict(list)
    for operation in flow.operations:
        named[operation.get_name()].append(operation)
    sums = flow.reached(result for product in named["tt.dot"] for result in results(product))
    turns = [(operands(turn)[0], results(turn)[0]) for turn in named["tt.trans"]]
    of_sums = flow.reached(new for old, new in turns if old in sums)
    of_any = flow.reached(new for _, new in turns)
    taken = [product.get_operand(i) for product in named["tt.dot"] for i in (0, 1)]
    return Transposed(
        *([str(x.get_type()) for x in taken if x.id() in found] for found in (of_sums, of_any))
    )


@triton.jit
def _square(x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    return x + at[:, None] * SIZE + at[None, :]


@triton.jit
def _product_of(x, y):
    return dot(x, y)


@triton.jit
def _turned(x):
    return x.T


@triton.jit
def turned_renamed(x, y, T, SIZE: tl.constexpr):
    """Under another name, added up in a loop, scaled and cast first, as it was reported."""
    a = tl.load(_square(x, SIZE))
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for _ in range(T):
        total += dot(a, a)
    kept = narrow(tl.where(total > 0, 2 * total, 0.0), tl.bfloat16)
    tl.store(_square(y, SIZE), dot(tl.trans(kept), a))


@triton.jit
def turned_by_helpers(x, y, T, SIZE: tl.constexpr):
    """The product and what transposes it are in other functions."""
    a = tl.load(_square(x, SIZE))
    kept = narrow(_product_of(a, a), tl.bfloat16)
    tl.store(_square(y, SIZE), _product_of(a, _turned(kept)))


@triton.jit
def turned_by_permute(x, y, T, SIZE: tl.constexpr):
    """Under yet another name of the operation, and before the cast."""
    a = tl.load(_square(x, SIZE))
    tl.store(_square(y, SIZE), dot(narrow(tl.permute(dot(a, a), (1, 0)), tl.bfloat16), a))


@triton.jit
def turned_round_later(x, y, T, SIZE: tl.constexpr):
    """A round of the loop transposes what the one before has left, in one of two branches."""
    a = tl.load(_square(x, SIZE))
    kept = a
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for t in range(T):
        total += dot(tl.trans(kept), a)
        if t % 2 == 0:
            kept = narrow(total, tl.bfloat16)
    tl.store(_square(y, SIZE), total)


@triton.jit
def turned_while(x, y, T, SIZE: tl.constexpr):
    """A loop whose rounds are not counted."""
    a = tl.load(_square(x, SIZE))
    kept = a
    while tl.load(y) < T:
        kept = narrow(dot(kept, a), tl.bfloat16)
    tl.store(_square(y, SIZE), dot(tl.trans(kept), a))


@triton.jit
def straight(x, y, T, SIZE: tl.constexpr):
    """As it should be: transposed are operands from memory, what is added to, what is stored."""
    a = tl.load(_square(x, SIZE))
    total = dot(a, tl.trans(a))
    total = tl.trans(total) + dot(narrow(total, tl.bfloat16), tl.trans(a))
    tl.store(_square(y, SIZE), tl.trans(total))


CONTROLS = (
    turned_renamed,
    turned_by_helpers,
    turned_by_permute,
    turned_round_later,
    turned_while,
    straight,
)
