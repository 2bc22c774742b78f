"""What the Triton kernels share: block sizes, launches, and what the interpreter needs.

Import this only where the Triton backend runs. Kernels count offsets in int64: a program's number
is widened (`tl.program_id(0).to(tl.int64)`) before it is multiplied by a size, and tokens or chunks
lie on the grid's first axis, the only one that holds more than 65,535.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib
import json
import os
import pkgutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rondo.kernels.triton_configs import CONFIGS, Config

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run as numpy (`TRITON_INTERPRET=1` when triton was imported)."""
SHARED_BYTES = {"sm90": 227 * 1024, "sm80": 163 * 1024, "gfx942": 64 * 1024}
"""Shared memory of a block, by chip family, the most first."""


@triton.jit
def dot(a, b):
    """`a @ b` in float32: exact float32 products for float32 operands, tensor cores for halves.

    The interpreter takes bfloat16 for integers in a product, so there operands are widened."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Float32 `x` in `dtype`, to the nearest: the interpreter would cut bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@dataclass(frozen=True)
class Compilation:
    """A kernel as it is launched, to be compiled without the device.

    `name` and `shape` are those given to `launch`, which supply block sizes, warps and stages.
    """

    name: str
    kernel: Any
    """The `triton.jit` function."""
    signature: dict[str, str]
    """Argument -> type, as "*bf16", "fp32" or "i32", of all that are not constants."""
    constants: dict[str, Any]
    """Constant arguments that are not in the table; pointers that are left out are None."""
    shape: str = "*"
    multiples: tuple[str, ...] = ()
    """Integers that are multiples of 16 in a real launch, which tells the compiler that rows are
    aligned; without, it reads one number at a time and runs out of registers."""
    dims: tuple[int, int] | None = None
    """Of keys and values, where a launch cuts tiles to them."""


def cut(config: Config, key_dim: int, value_dim: int) -> Config:
    """A configuration whose tiles BK and BV are no wider than the dimensions ask for."""
    dims = {"BK": key_dim, "BV": value_dim}
    return {
        name: min(size, max(16, triton.next_power_of_2(dims[name]))) if name in dims else size
        for name, size in config.items()
    }


def configurations(name: str, shape: str, family: str) -> tuple[Config, ...]:
    """The row of the table for a kernel: the one to use, then alternatives worth measuring."""
    rows = CONFIGS[name]
    for key in (f"{shape} {family}", shape, family, "*"):
        if key in rows:
            return rows[key]
    raise ValueError(f"{name} has no row for {shape} on {family}, only {', '.join(rows)}")


@functools.cache
def chip_family(device: torch.device) -> str:
    """The family whose rows fit the shared memory of `device` ("sm80" for the interpreter)."""
    if device.type != "cuda":
        return "sm80"
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    fitting = [f for f, size in SHARED_BYTES.items() if properties["max_shared_mem"] >= size]
    return (*fitting, "gfx942")[0]


def launch(
    name: str,
    shape: str,
    like: Tensor,
    sizes: tuple[int | str, ...],
    start: Callable[[Config], None],
) -> None:
    """Calls `start(config)` on the device of `like` with the configuration for the kernel `name`.

    Args:
        name: of the kernel in `CONFIGS`.
        shape: class of shapes that share a configuration.
        like: a tensor of the dtype whose rows the kernel reads.
        sizes: what the fastest alternative may also depend on, such as channels of a row or a head
            and the kind of gate: each is measured for itself. Never a number of tokens, which would
            be measured at every new length.
        start: launches the kernel. With RONDO_AUTOTUNE=1 it is first called over and over for
            each alternative, so it must write its results, not add to them.
    """
    device = like.device
    family = chip_family(device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        candidates = configurations(name, shape, family)
        config = candidates[0]
        tune = device.type == "cuda" and os.environ.get("RONDO_AUTOTUNE") == "1"
        if tune and len(candidates) > 1:
            kind = " ".join((str(like.dtype).removeprefix("torch."), *map(str, sizes)))
            config = _fastest((name, shape, kind), device, candidates, start)
        start(config)


_measured: dict[str, Config] = {}


def _fastest(
    call: tuple[str, str, str],
    device: torch.device,
    candidates: tuple[Config, ...],
    start: Callable[[Config], None],
) -> Config:
    """The quickest candidate for a kernel, class of shapes and dtype with sizes on this chip:
    measured once, then read from a file, until a kernel or Triton changes."""
    chip = torch.cuda.get_device_name(device)
    versions = f"triton {triton.__version__}", f"kernels {kernel_sources()}"
    key = " | ".join((*call, chip, *versions))
    if key not in _measured:
        path = cache_file()
        _measured.update(json.loads(path.read_text()) if path.exists() else {})
    if _measured.get(key) not in candidates:
        times = [_milliseconds(functools.partial(start, config)) for config in candidates]
        _measured[key] = _keep(key, candidates[times.index(min(times))], candidates)
    return _measured[key]


def cache_file() -> Path:
    """Where measured configurations lie."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "rondo" / "triton.json"


@functools.cache
def kernel_sources(folder: Path = Path(__file__).parent) -> str:
    """A hash of all modules with kernels together, since kernels call each other's functions."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*triton*.py")):
        text = path.read_bytes()
        if b"@triton.jit" in text:
            found.update(text)
    return found.hexdigest()[:12]


def _keep(key: str, config: Config, candidates: tuple[Config, ...]) -> Config:
    """Adds one to the file, unless another process was first: all are to round alike. Returns what
    is there then."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        rows: dict[str, Config] = json.loads(path.read_text()) if path.exists() else {}
        if rows.get(key) not in candidates:
            rows[key] = config
            part = path.with_suffix(".part")  # others read without the lock
            part.write_text(json.dumps(rows, indent=1, sort_keys=True))
            part.replace(path)
    return rows[key]


def _milliseconds(run: Callable[[], None]) -> float:
    """Median time, or infinity when the chip cannot hold the kernel."""
    try:
        return triton.testing.do_bench(run, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")


@functools.cache
def resident_programs(device: torch.device) -> int:
    """How many programs that each walk over many rows keep `device` busy (3 in the interpreter)."""
    if device.type != "cuda":
        return 3
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def opaque(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable]:
    """Makes of a function that launches kernels one operator `rondo::<name>` to a compiler.

    Eager calls skip the operator, which costs more to enter than a small kernel runs. `fake` makes
    results of the right shapes; no result may be one of the arguments.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        operator = torch.library.custom_op(f"rondo::{name}", function, mutates_args=())
        operator.register_fake(fake)

        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            compiling = torch.compiler.is_compiling()
            return operator(*arguments) if compiling else function(*arguments)

        return run

    return decorate


def all_compilations() -> list[Compilation]:
    """What `ahead_of_time()` of every module `triton` or `..._triton` in this package lists."""
    package = importlib.import_module("rondo.kernels")
    found: list[Compilation] = []
    for module in pkgutil.walk_packages(package.__path__, "rondo.kernels."):
        if module.name.endswith(("_triton", ".triton")):
            found += importlib.import_module(module.name).ahead_of_time()
    return found
