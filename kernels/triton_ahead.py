"""Compiles the Triton kernels for chips that are not here and says what they would use of them.

python -m rondo.kernels.triton_ahead [--only PART_OF_A_NAME] [--jobs N]

With every configuration of its table: the first of a row and those that are only measured.
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

from rondo.kernels.triton_configs import Config
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
REGISTERS = {"sm80": (255, 2**16), "sm90": (255, 2**16), "gfx942": (512, 2**17)}
"""The most of a thread and of a block; on gfx942 vector registers, accumulators among them."""
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_AMD_USAGE = re.compile(
    r"^\s+\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", re.MULTILINE
)


def candidates(compilation: Compilation, family: str) -> list[Config]:
    """The configurations that a kernel may be launched with on a family of chips, cut to its
    dimensions; those that are the same after that only once."""
    found: list[Config] = []
    for config in configurations(compilation.name, compilation.shape, family):
        config = config if compilation.dims is None else cut(config, *compilation.dims)
        if config not in found:
            found.append(config)
    return found


def compile_for(compilation: Compilation, family: str, config: Config) -> dict[str, Any]:
    """Compiles one kernel for one family of chips with one of its `candidates`.

    Returns:
        kernel, shape, dims, family and config; shared and limit (bytes of a block), registers and
        most (of a thread), spilled (bytes of a thread: what did not fit into registers lies in
        memory), seconds, and on NVIDIA wgmma (how many of Hopper's instructions that multiply
        matrices straight from shared memory).
    """
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    sizes = {name: size for name, size in config.items() if name not in options}
    constants = {**compilation.constants, **sizes}
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
        "dims": compilation.dims,
        "family": family,
        "config": config,
        "shared": compiled.metadata.shared,
        "limit": SHARED_BYTES[family],
        "most": most_registers(family, config["num_warps"]),
    }
    if family.startswith("sm"):
        used |= _registers(compiled.asm["cubin"], compilation.name)
        used["wgmma"] = compiled.asm["ptx"].count("wgmma.mma_async")
    else:
        used |= _amd_registers(compiled.asm["amdgcn"], compilation.name)
    return {**used, "seconds": round(time.perf_counter() - start, 2)}


def most_registers(family: str, warps: int) -> int:
    """Of a thread, so that a block fits."""
    each, block = REGISTERS[family]
    return min(each, block // (warps * TARGETS[family].warp_size))


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


def _amd_registers(assembly: str, kernel: str) -> dict[str, int]:
    """What the code for an AMD chip uses, by the notes behind it; what is not in registers lies in
    scratch memory."""
    found = dict(_AMD_USAGE.findall(assembly))
    if len(found) != 3:
        raise RuntimeError(f"the code of {kernel} says only {found} of its registers")
    spilled = max(4 * int(found["vgpr_spill_count"]), int(found["private_segment_fixed_size"]))
    return {"registers": int(found["vgpr_count"]), "spilled": spilled}


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
    given = all_compilations()
    wanted = [i for i, each in enumerate(given) if options.only in each.name]
    calls = [(i, f, config) for i in wanted for f in TARGETS for config in candidates(given[i], f)]
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.jobs, get_context("spawn"), _keep_in, (folder,)) as pool,
    ):
        for used in pool.map(_compile, *zip(*calls, strict=True)):
            print(json.dumps(used), flush=True)


def _keep_in(folder: str) -> None:
    triton.knobs.cache.dir = folder


def _compile(index: int, family: str, config: Config) -> dict[str, Any]:
    return compile_for(all_compilations()[index], family, config)


if __name__ == "__main__":
    main()
