"""Finds arithmetic of 32 bits in Triton kernels that a large call would overflow.

Each integer in Triton's own intermediate code of a kernel (`triton_code.py`) gets bounds: of
program numbers and arguments what a call may have, of all else what follows.
An offset is right if it is in 64 bits, or if nothing on the way can exceed 32; looking at the type
of the offset alone would miss one that overflowed before it was widened.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import triton
import triton.language as tl

from rondo.kernels.triton_support import Compilation

LARGEST = 2**29
"""Of an argument: tokens in a row, rows, numbers from row to row."""
LARGEST_OF = {"blocks": 2**18, "tiles": 2**24, "chunks": 2**24, "channels": 2**24, "width": 2**24}
"""Of arguments that count tiles, or the channels of a position."""
PROGRAMS = 2**31 - 1
_OP = re.compile(r'^\s*(?:%(\w+)(?::(\d+))? = )?"?([a-z]\w*\.[\w.]+|scf\.\w+)"?(.*)$')
_NAME = re.compile(r"%\w+(?:#\d+)?")
_INTEGER = re.compile(r"(?:tensor<[\dx]+x)?(i\d+|index)>?$")
_SAME = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi")


class Bounds(NamedTuple):
    """The least and the most that an integer can be."""

    low: int
    high: int


def full(bits: int) -> Bounds:
    """What a signed integer can hold."""
    return Bounds(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def ends(operation: str, a: Bounds, b: Bounds) -> Bounds | None:
    """Of an operation on two integers; None where nothing is known."""
    corners = {
        "addi": lambda: (a.low + b.low, a.high + b.high),
        "subi": lambda: (a.low - b.high, a.high - b.low),
        "muli": lambda: [x * y for x in a for y in b],
        "minsi": lambda: (min(a.low, b.low), min(a.high, b.high)),
        "maxsi": lambda: (max(a.low, b.low), max(a.high, b.high)),
        "divsi": lambda: [int(x / y) if abs(x) < 2**52 else x // y for x in a for y in positive(b)],
        "remsi": lambda: (min(0, max(a.low, 1 - b.high)), max(0, min(a.high, b.high - 1))),
    }
    if operation not in corners or (operation in ("divsi", "remsi") and b.high < 1):
        return None
    found = corners[operation]()
    return Bounds(min(found), max(found))


def positive(x: Bounds) -> Bounds:
    """Of a divisor: sizes are at least 1."""
    return Bounds(max(x.low, 1), x.high)


class Overflows:
    """Reads the code of one kernel from top to bottom; a name is known before it is used, and
    integers that a loop carries are taken for anything."""

    def __init__(self, code: str, arguments: list[str]) -> None:
        self.known: dict[str, Bounds] = {}
        self.found: list[str] = []
        for line in code.splitlines():
            if "tt.func" in line:
                self._arguments(line, arguments)
            elif match := _OP.match(line):
                self._operation(*match.groups(), line.strip())

    def _arguments(self, line: str, names: list[str]) -> None:
        given = re.findall(r"%(\w+): (\S+?)[ ,)]", line)
        for (place, kind), name in zip(given, names, strict=True):
            if kind.startswith("i"):
                self.known[place] = Bounds(0, LARGEST_OF.get(name, LARGEST))

    def _operation(
        self, result: str | None, count: str | None, operation: str, rest: str, line: str
    ) -> None:
        if operation == "scf.for":
            self._loop(result, rest)
        elif result is not None and count is None:
            integer = _INTEGER.search(rest.split("->")[-1].split(" : ")[-1].split(" to ")[-1])
            if integer is not None:
                bits = 64 if integer[1] == "index" else int(integer[1][1:])
                self._result(result, operation, rest, bits, line)

    def _loop(self, result: str | None, rest: str) -> None:
        index, first, last = _NAME.findall(rest)[:3]
        self.known[index[1:]] = Bounds(self.bounds(first, 64).low, self.bounds(last, 64).high)
        for name in _NAME.findall(rest)[4:]:  # what it carries
            self.known.pop(name[1:], None)

    def _result(self, result: str, operation: str, rest: str, bits: int, line: str) -> None:
        operands = _NAME.findall(rest.split(" : ")[0])
        bounds: Bounds | None = full(bits)
        if operation == "arith.constant":
            value = re.search(r"(?:dense<)?(-?\d+|true|false)", rest)
            assert value is not None, line
            bounds = Bounds(*[int(value[1])] * 2) if value[1][-1].isdigit() else Bounds(0, 1)
        elif operation in ("tt.get_program_id", "tt.get_num_programs"):
            bounds = Bounds(0, PROGRAMS)
        elif operation == "tt.make_range":
            span = re.search(r"end = (\d+) : i32, start = (\d+)", rest)
            assert span is not None, line
            bounds = Bounds(int(span[2]), int(span[1]) - 1)
        elif operation in _SAME or operation == "arith.trunci":
            bounds = self.bounds(operands[0], bits if operation != "arith.trunci" else 64)
        elif operation == "arith.select":
            one, other = (self.bounds(name, bits) for name in operands[1:])
            bounds = Bounds(min(one.low, other.low), max(one.high, other.high))
        elif operation.startswith("arith.") and len(operands) == 2 and bits > 1:
            known = (self.bounds(name, bits) for name in operands)
            bounds = ends(operation.removeprefix("arith."), *known)
        self._keep(result, bounds, bits, line)

    def _keep(self, result: str, bounds: Bounds | None, bits: int, line: str) -> None:
        """Within what the type holds; 64 bits are taken to be enough."""
        most = full(bits)
        if bounds is None:
            bounds = most
        if 1 < bits <= 32 and (bounds.low < most.low or bounds.high > most.high):
            self.found.append(line)
        self.known[result] = Bounds(max(bounds.low, most.low), min(bounds.high, most.high))

    def bounds(self, name: str, bits: int) -> Bounds:
        """Of a name; of one that nothing is known of all that its type holds."""
        return self.known.get(name[1:], full(bits))


def overflows(code: str, arguments: list[str]) -> list[str]:
    """The lines of a kernel's intermediate code in which 32 bits are not enough."""
    return Overflows(code, arguments).found


def specialised(kernel: Compilation) -> list[str]:
    """Integer arguments of a call whose value, where it is 1 or a multiple of 16, makes another
    program of the kernel: all but blocks and tiles, which follow from a width, and widths that are
    multiples in every call of this size."""
    free = {*kernel.kernel.do_not_specialize, *kernel.multiples, "blocks", "tiles"}
    names = set(kernel.kernel.arg_names) - set(kernel.constants) - free
    return sorted(n for n in names if kernel.signature.get(n) in ("i32", "i64"))


@triton.jit
def narrow_program(x, SIZE: tl.constexpr):
    """Widened after the product."""
    at = (tl.program_id(0) * SIZE).to(tl.int64) + tl.arange(0, SIZE)
    tl.store(x + at, 0.0)


@triton.jit
def narrow_stride(x, T, SIZE: tl.constexpr):
    """The distance of rows is made in 32 bits."""
    tl.store(x + tl.program_id(0).to(tl.int64) * (T * SIZE), 0.0)


@triton.jit
def narrow_index(x, order, SIZE: tl.constexpr):
    """An index from memory is not widened."""
    tl.store(x + tl.load(order + tl.program_id(0)) * SIZE, 0.0)


@triton.jit
def narrow_loop(x, T, SIZE: tl.constexpr):
    """An offset grows in a loop."""
    at = 0
    for _ in range(T):
        tl.store(x + at, 0.0)
        at += SIZE


@triton.jit
def narrow_cut(x, SIZE: tl.constexpr):
    """Cut off after a product of 64 bits."""
    tl.store(x + (tl.program_id(0).to(tl.int64) * SIZE).to(tl.int32), 0.0)


@triton.jit
def wide(x, order, T, SIZE: tl.constexpr):
    """As it should be."""
    program = tl.program_id(0).to(tl.int64)
    index = tl.load(order + program).to(tl.int64)
    for t in range(T):
        tl.store(x + (program * T + t + index) * SIZE + tl.arange(0, SIZE), 0.0)


CONTROLS = (narrow_program, narrow_stride, narrow_index, narrow_loop, narrow_cut, wide)
