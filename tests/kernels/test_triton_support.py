"""What the Triton kernels share: the choice of the backend, products, configurations."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.jit import KernelInterface

from rondo.kernels import backend, triton_support
from rondo.kernels.linear_attention.triton_tiles import HEAD, KEY
from rondo.kernels.triton_configs import CONFIGS
from rondo.kernels.triton_support import (
    Compilation,
    chip_family,
    configurations,
    dot,
    launch,
    narrow,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
SIZES = {"half", "float32"}
RECURRENCES = {"linear_attention": ("{}",), "delta_rule": ("{}", "{} wide")}
CLASSES = RECURRENCES | dict.fromkeys(("rms_norm", "fast_renew"), ("d256", "d1024", "long"))
"""Part of a kernel's name -> the classes of shapes that its launches name, of numbers of a size."""
FLOAT32_ONLY = {
    *("linear_scan_borders", "newton_borders", "linear_attention_gate_sums"),
    *("fast_parts", "fast_parts_backward", "fast_renew", "fast_renew_backward"),
    *("memory_advance", "memory_advance_backward", "memory_scale"),
}
"""What works on states and sums."""
pytestmark = pytest.mark.quick


@triton.jit
def product(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    result = dot(tl.load(a + at), tl.trans(tl.load(b + at)))
    tl.store(out + at, narrow(result, out.dtype.element_ty))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_dot_and_narrow(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    out = torch.empty_like(a)
    product[(1,)](a, b, out, 16)
    expected = a.double() @ b.double().T
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@triton.jit
def shift(x, y, SIZE: tl.constexpr, BY: tl.constexpr, INTO: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at + INTO, tl.load(x + at + BY, mask=at < SIZE - 1, other=0.0))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter checks, a GPU does not")
@pytest.mark.parametrize(
    ("by", "into", "message"),
    [(1, 0, None), (2, 0, "would read"), (-1, 0, "would read"), (0, 1, "would write")],
)
def test_tests_see_what_is_outside(by: int, into: int, message: str | None) -> None:
    """By the fixture of `conftest.py` that all tests of kernels run with; in the middle of their
    memory no other tensor is hit."""
    x, y = (torch.zeros(24)[8:16] for _ in range(2))
    if message is None:
        shift[(1,)](x, y, 8, by, into)
    else:
        with pytest.raises(Exception, match=f"a kernel {message}"):
            shift[(1,)](x, y, 8, by, into)


def test_narrow_keeps_infinity() -> None:
    a, b = torch.eye(16, device=DEVICE), torch.eye(16, device=DEVICE) * 3.4e38
    out = torch.empty_like(a, dtype=torch.bfloat16)
    product[(1,)](a, b, out, 16)
    assert out.isinf().sum() == 16


def choice(name: str, device: str = "cpu", refusal: str | None = None) -> Any:
    functions = {"chunked": len, "triton": sum}
    return backend.choose("op", name, functions, torch.device(device), refusal)


def test_auto(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "_logged", {})
    with caplog.at_level(logging.INFO, backend.logger.name):
        assert choice("auto") is len  # even where the interpreter could run
        assert choice("auto", "cuda") is sum
        assert choice("auto", "cuda", "it is Tuesday") is len
        cuda, functions = torch.device("cuda"), {"chunked": len}
        assert backend.choose("other", "auto", functions, cuda, "it has none") is len
    assert "op runs on backend chunked (triton cannot: it is Tuesday)" in caplog.text
    assert "other runs on backend chunked (triton cannot: it has none)" in caplog.text
    monkeypatch.setattr(backend, "_is_installed", lambda package: False)
    assert choice("auto", "cuda") is len
    with pytest.raises(ModuleNotFoundError, match="pip install triton") as error:
        choice("triton", "cuda")
    assert error.value.name == "triton"


def test_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice("triton", "cuda") is sum
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert choice("triton") is sum
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=r"needs CUDA tensors, got cpu; .* TRITON_INTERPRET=1"):
        choice("triton")
    with pytest.raises(ValueError, match="op: backend 'triton' cannot run: it is Tuesday"):
        choice("triton", "cuda", "it is Tuesday")


@pytest.mark.parametrize(
    ("version", "capability", "doubtful"),
    [
        *(("3.3.1", (9, 0), False), ("3.4.0", (9, 0), True), ("3.7.0+git1", (9, 0), True)),
        *(("3.7.1", (9, 0), False), ("3.10.0", (9, 0), False)),
        *(("3.6.0", (8, 0), False), ("3.6.0", (10, 0), False)),
    ],
)
def test_versions_that_compile_wrong_gradients(
    version: str,
    capability: tuple[int, int],
    doubtful: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(backend, "_triton_version", lambda: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda, functions = torch.device("cuda"), {"chunked": len, "triton": sum}
    for name, found in (("auto", len if doubtful else sum), ("triton", sum)):
        monkeypatch.setattr(backend, "_logged", {})
        caplog.clear()
        with caplog.at_level(logging.INFO, backend.logger.name):
            for _ in range(2):
                assert backend.choose_recurrence("op", name, functions, cuda, None) is found
        (record,) = caplog.records  # said once
        assert record.levelno == (logging.WARNING if doubtful else logging.INFO)
        assert (f"triton {version} is known" in record.getMessage()) == doubtful
        assert not doubtful or "update to 3.7.1 or later" in record.getMessage()
    monkeypatch.setattr(torch.version, "hip", "7.0")  # its numbers mean other chips
    assert backend.triton_doubt(cuda) is None and backend.triton_doubt(CPU) is None


@pytest.mark.parametrize(
    ("kernel", "shape"),
    [
        *itertools.product(
            [f"delta_rule_{name}" for name in ("transform", "walk", "mix", "pairs", "readers")],
            ("half", "half wide"),
        ),
        *((f"linear_attention_{name}", "half") for name in ("mix", "score_gradients", "gradients")),
    ],
)
def test_halves_of_recurrences_do_without_wgmma_on_hopper(kernel: str, shape: str) -> None:
    """It takes four warps; Triton 3.7.1 makes wrong gradients and reads what is not there with it
    (flash-linear-attention issue 984). That the code has none `test_triton_compile.py` tests."""
    rows = configurations(kernel, shape, "sm90")
    assert {row["num_warps"] for row in rows} <= {1, 2}


def test_tensors_that_no_kernel_takes() -> None:
    class Other(torch.Tensor):
        pass

    plain = torch.ones(2)
    assert backend.triton_refusal(plain, None, torch.nn.Parameter(plain), plain.long()) is None
    refusal = backend.triton_refusal(plain, plain.double())
    assert refusal == "it takes float32, bfloat16, float16, got float64"
    refusal = backend.triton_refusal(plain.as_subclass(Other))
    assert refusal == "it takes plain tensors, got Other"


def test_rows_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {key: ({"SIZE": size},) for size, key in enumerate(("d64 sm90", "d64", "sm80", "*"))}
    monkeypatch.setitem(CONFIGS, "op", rows)
    sizes = [
        configurations("op", shape, family)[0]["SIZE"]
        for shape in ("d64", "d128")
        for family in ("sm90", "sm80", "gfx942")
    ]
    assert sizes == [0, 1, 1, 3, 2, 3]
    assert chip_family(CPU) == "sm80"


def test_a_class_without_a_row_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "op", {"half": ({"SIZE": 1},), "float32 sm90": ({"SIZE": 2},)})
    with pytest.raises(
        ValueError, match=r"op has no row for float32 on sm80, only half, float32 sm"
    ):
        configurations("op", "float32", "sm80")


def size_of(kernel: Compilation) -> str:
    """Of the numbers it reads: halves if there are any among its tensors."""
    there = [n for n in kernel.kernel.arg_names if kernel.constants.get(n, 0) is not None]
    return "half" if "*bf16" in (kernel.signature.get(n) for n in there) else "float32"


def test_every_row_is_compiled_with_the_numbers_it_may_meet() -> None:
    """In halves and in float32, for every class of shapes and family of chips; no row is one that
    nobody has tried. Float16 is left out: it makes the code of bfloat16, with other types."""
    compiled = {
        (kernel.name, size_of(kernel), row_of(kernel.name, kernel.shape, family))
        for kernel in triton_support.all_compilations()
        for family in triton_support.SHARED_BYTES
    }
    met = set()
    for name, size, family in itertools.product(CONFIGS, SIZES, triton_support.SHARED_BYTES):
        classes = next((c for part, c in CLASSES.items() if part in name), ("*",))
        met |= {(name, size, row_of(name, c.format(size), family)) for c in classes}
    never = {each for each in met if each[0] in FLOAT32_ONLY and each[1] == "half"}
    assert met - never == compiled
    rows = {(name, key) for name, rows in CONFIGS.items() for key in rows}
    assert {(name, row) for name, _, row in compiled} == rows


def test_the_delta_rule_is_compiled_for_wide_heads_too() -> None:
    """Classes that share a row need not fit alike: with more keys more is kept."""
    compiled = {(kernel.name, kernel.shape) for kernel in triton_support.all_compilations()}
    names = [name for name in CONFIGS if name.startswith("delta_rule")]
    classes = [c.format(size) for c in CLASSES["delta_rule"] for size in SIZES]
    assert set(itertools.product(names, classes)) <= compiled


def test_recurrences_are_compiled_with_both_kinds_of_decay() -> None:
    """One a head and one a key channel. Without any, less of the same code is left."""
    compiled = {
        (kernel.name, kernel.constants["GATE"])
        for kernel in triton_support.all_compilations()
        if kernel.name.startswith(tuple(RECURRENCES)) and "GATE" in kernel.constants
    }
    names, head, key = {name for name, _ in compiled}, HEAD.value, KEY.value
    own = {("linear_attention_gradients", key), ("delta_rule_readers", key)}  # by other kernels
    own |= {("delta_rule_key_gate", head)}
    assert compiled == {*itertools.product(names, (head, key))} - own


def called_by(kernels: Iterable[Any]) -> set[Callable[..., Any]]:
    """The Python functions of kernels, and of all that they call, whole."""
    found, waiting = set(), [kernel.fn for kernel in kernels]
    while waiting:
        function = waiting.pop()
        if function not in found:
            found.add(function)
            names = [function.__globals__.get(name) for name in function.__code__.co_names]
            waiting += [each.fn for each in names if isinstance(each, KernelInterface)]
    return found


def test_no_function_of_a_kernel_is_compiled_nowhere() -> None:
    """What is compiled ahead of time, and looked at for overflows, is all there is."""
    compiled = called_by(each.kernel for each in triton_support.all_compilations())
    modules = [m for n, m in sys.modules.items() if n.startswith("rondo.kernels.")]
    written = {
        value.fn
        for module in modules
        for value in vars(module).values()
        if isinstance(value, KernelInterface) and value.fn.__module__.startswith("rondo.kernels.")
    }
    sources = Path(triton_support.__file__).parent.rglob("*.py")
    assert len(written) == sum(path.read_text().count("\n@triton.jit") for path in sources) > 50
    assert {f.__qualname__ for f in written - compiled} == set()


def row_of(name: str, shape: str, family: str) -> str:
    found = configurations(name, shape, family)
    return next(key for key, row in CONFIGS[name].items() if row is found)


def test_measured_alternatives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "chip")
    monkeypatch.setattr(triton_support, "_measured", {})
    measured: list[int] = []

    def do_bench(run: Any, return_mode: str) -> float:
        run()
        return float(measured[-1])

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)

    def start(config: dict[str, int]) -> None:
        if config["SIZE"] == 1:
            raise triton.runtime.errors.OutOfResources(9, 8, "shared memory")
        measured.append(config["SIZE"])

    call = ("op", "d64", "float32 64")
    candidates = tuple({"SIZE": size} for size in (7, 1, 3))
    for _ in range(2):  # the second time from the file
        assert triton_support._fastest(call, CPU, candidates, start) == {"SIZE": 3}
        triton_support._measured.clear()
    assert measured == [7, 3]
    kept = json.loads(triton_support.cache_file().read_text())
    versions = f"triton {triton.__version__} | kernels {triton_support.kernel_sources()}"
    assert kept == {f"op | d64 | float32 64 | chip | {versions}": {"SIZE": 3}}
    other = ({"SIZE": 9}, {"SIZE": 8})  # the table has changed: measured again
    assert triton_support._fastest(call, CPU, other, start) == {"SIZE": 8}
    measured.clear()
    monkeypatch.setattr(triton_support, "kernel_sources", lambda: "others")
    assert triton_support._fastest(call, CPU, other, start) == {"SIZE": 8} and measured == [9, 8]


def test_sources_are_those_of_kernels(tmp_path: Path) -> None:
    (tmp_path / "op").mkdir()
    kernels, table = tmp_path / "op" / "triton_sums.py", tmp_path / "triton_configs.py"
    kernels.write_text("@triton.jit\ndef f(x): ...")
    table.write_text("CONFIGS = 1")
    before = triton_support.kernel_sources.__wrapped__(tmp_path)
    table.write_text("CONFIGS = 2")  # its rows are compared themselves
    assert triton_support.kernel_sources.__wrapped__(tmp_path) == before
    kernels.write_text("@triton.jit\ndef f(y): ...")
    assert triton_support.kernel_sources.__wrapped__(tmp_path) != before
    assert re.fullmatch("[0-9a-f]{12}", triton_support.kernel_sources())


def keep_many(name: str, start: Any) -> None:
    start.wait()
    for i in range(40):
        triton_support._keep(f"{name} {i}", {"SIZE": i}, ({"SIZE": i},))


def test_processes_that_write_at_once_lose_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    context = multiprocessing.get_context("fork")
    start, names = context.Barrier(2), ("one", "two")
    processes = [context.Process(target=keep_many, args=(name, start)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    kept = json.loads(triton_support.cache_file().read_text())
    assert kept == {f"{name} {i}": {"SIZE": i} for name in names for i in range(40)}


def test_the_first_process_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    candidates = ({"SIZE": 1}, {"SIZE": 2})
    assert triton_support._keep("op", {"SIZE": 1}, candidates) == {"SIZE": 1}
    assert triton_support._keep("op", {"SIZE": 2}, candidates) == {"SIZE": 1}
    changed = ({"SIZE": 3}, {"SIZE": 2})
    assert triton_support._keep("op", {"SIZE": 2}, changed) == {"SIZE": 2}


def test_each_dtype_and_size_is_measured_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setenv("RONDO_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(triton_support, "chip_family", lambda device: "sm80")
    monkeypatch.setattr(triton_support, "_fastest", lambda call, *others: asked.append(call))
    monkeypatch.setitem(CONFIGS, "op", {"*": ({"SIZE": 1}, {"SIZE": 2})})
    for dtype, sizes in ((torch.float32, (64, "forward")), (torch.bfloat16, (128,))):
        like = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
        launch("op", "d128", like, sizes, lambda config: None)
    assert asked == [("op", "d128", "float32 64 forward"), ("op", "d128", "bfloat16 128")]


def test_launch_takes_the_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "op", {"*": ({"SIZE": 1}, {"SIZE": 2})})
    started: list[dict[str, int]] = []
    launch("op", "d64", torch.empty(0), (64,), started.append)
    assert started == [{"SIZE": 1}]
