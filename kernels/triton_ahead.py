"""Compiles the Triton kernels for chips that are not here and says what they would use of them.

python -m rondo.kernels.triton_ahead [--only PART_OF_A_NAME] [--jobs N]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rondo.kernels.triton_support import (
    SHARED_BYTES,
    Compilation,
    all_compilations,
    configurations,
    cut,
)

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def compile_for(compilation: Compilation, family: str) -> dict[str, Any]:
    """Compiles one kernel for one family of chips.

    Returns:
        kernel, shape, family, shared and limit (bytes of a block), seconds, and for NVIDIA
        registers (of a thread) and spilled (bytes of a thread).
    """
    config = dict(configurations(compilation.name, compilation.shape, family)[0])
    if compilation.dims is not None:
        config = cut(config, *compilation.dims)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    constants = {**compilation.constants, **config}
    names = compilation.kernel.arg_names
    types = {n: "constexpr" if n in constants else compilation.signature[n] for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if types[n].startswith("*") or n in compilation.multiples
    }
    source = ASTSource(compilation.kernel, types, constants, aligned)
    start = time.perf_counter()
    compiled = triton.compile(source, target=TARGETS[family], options=options)
    used = {
        "kernel": compilation.name,
        "shape": compilation.shape,
        "family": family,
        "shared": compiled.metadata.shared,
        "limit": SHARED_BYTES[family],
    }
    if family.startswith("sm"):
        used |= _registers(compiled.asm["cubin"], compilation.name)
    return {**used, "seconds": round(time.perf_counter() - start, 2)}


def _registers(cubin: bytes, kernel: str) -> dict[str, int]:
    """What the code for an NVIDIA chip uses; registers that did not suffice lie on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _USAGE.search(said)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of the registers of {kernel}: {said}")
    return {"registers": int(found[1]), "spilled": int(found[2]) + int(found[3])}


def main() -> None:
    """Prints a JSON object a kernel and family; compiles all anew."""
    parser = argparse.ArgumentParser(
        prog="python -m rondo.kernels.triton_ahead",
        description="Compiles the Triton kernels for chips that are not here and prints what each "
        "uses of them, a JSON object a line.",
    )
    parser.add_argument("--only", default="", help="kernels with this in their name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args()
    wanted = [i for i, each in enumerate(all_compilations()) if options.only in each.name]
    pairs = [(i, family) for i in wanted for family in TARGETS]
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.jobs, get_context("spawn"), _keep_in, (folder,)) as pool,
    ):
        for used in pool.map(_compile, *zip(*pairs, strict=True)):
            print(json.dumps(used), flush=True)


def _keep_in(folder: str) -> None:
    triton.knobs.cache.dir = folder


def _compile(index: int, family: str) -> dict[str, Any]:
    return compile_for(all_compilations()[index], family)


if __name__ == "__main__":
    main()
