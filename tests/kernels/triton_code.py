"""Reads Triton's own intermediate code, which knows no chip, of every kernel.

python -m rondo.tests.kernels.triton_code

Prints what `triton_offsets.py` and `triton_transposed.py` find, a JSON object a kernel and form,
and the same of kernels that must be found out. Needs a process without TRITON_INTERPRET, with which
kernels are numpy.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.compiler.errors import CompilationError

from rondo.kernels.triton_support import Compilation, all_compilations, configurations
from rondo.tests.kernels import triton_offsets, triton_transposed


class Code(NamedTuple):
    """A kernel's intermediate code."""

    module: Any
    arguments: list[str]
    """Those that are not constants, in order."""


def lowered(kernel: Compilation) -> Code:
    """With the configuration that it is launched with on Hopper GPUs.

    Raises:
        CompilationError: the kernel has no such form.
    """
    config = dict(configurations(kernel.name, kernel.shape, "sm90")[0])
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    names = kernel.kernel.arg_names
    constants = {n: v for n, v in {**kernel.constants, **config}.items() if n in names}
    types = {n: "constexpr" if n in constants else kernel.signature[n] for n in names}
    source, target = ASTSource(kernel.kernel, types, constants, {}), GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    parsed, context = backend.parse_options(options), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    generated = backend.get_codegen_implementation(parsed), backend.get_module_map()
    made = source.make_ir(target, parsed, *generated, context)
    module = backend.make_ttir(made, {}, parsed, target.arch)
    return Code(module, [n for n in names if n not in constants])


def other_forms(kernel: Compilation) -> Iterator[Compilation]:
    """The kernel in every direction and with every kind of gate."""
    choices = {"REVERSE": (False, True), "GATE": (0, 1, 2)}
    open_ = {name: x for name, x in choices.items() if name in kernel.kernel.arg_names}
    for values in itertools.product(*open_.values()):
        constants = {**kernel.constants, **dict(zip(open_, values, strict=True))}
        if constants != kernel.constants:
            yield replace(kernel, constants=constants)


def forms() -> Iterator[tuple[Compilation, bool]]:
    """Every kernel as it is launched, then in its other forms, for which it is true: once, since
    other sizes have the same ones."""
    known = set()
    for kernel in all_compilations():
        yield kernel, False
        absent = tuple(name for name, value in kernel.constants.items() if value is None)
        if (kernel.kernel, absent) not in known:
            known.add((kernel.kernel, absent))
            yield from ((form, True) for form in other_forms(kernel))


def found(kernel: Compilation) -> dict[str, Any]:
    """What both readers find in it."""
    code = lowered(kernel)
    turned = triton_transposed.transposed(code.module)
    return {
        "overflows": triton_offsets.overflows(code.module.str_nodebug(), code.arguments),
        "transposed_sums": turned.sums,
        "transposed": turned.any,
    }


def main() -> None:
    """Prints what is found, of the controls first."""
    types = {"x": "*fp32", "y": "*fp32", "order": "*i32", "T": "i32"}
    for reader, x in ((triton_offsets, "*fp32"), (triton_transposed, "*bf16")):
        for kernel in reader.CONTROLS:
            control = Compilation("linear_scan_borders", kernel, types | {"x": x}, {"SIZE": 64})
            print(json.dumps({"control": kernel.__name__, **found(control)}))
    for kernel, other in forms():
        line = {"kernel": kernel.name, "module": kernel.kernel.fn.__module__, "other": other}
        try:
            line |= found(kernel)
        except CompilationError:
            if not other:  # some gates need other tensors
                raise
            continue
        print(json.dumps(line | {"specialised": triton_offsets.specialised(kernel)}))


if __name__ == "__main__":
    main()
