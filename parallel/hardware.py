"""The peak a utilisation is measured against, and the memory in use."""

from __future__ import annotations

import ctypes
import functools
import resource
import time

import torch

# Dense bfloat16 FLOP/s of the data sheets, by a word in the device's name.
GPU_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "MI300X": 1307e12, "B200": 2250e12}


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Matrix-product FLOP/s this rank could reach: the data sheet's on a known GPU, else the
    best of a few products of 1024 x 1024 matrices, measured once a process (about 0.1 s)."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for word, peak in GPU_PEAKS.items():
            if word in name:
                return peak
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of eight products of square matrices, now."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(8):
        _synchronize(device)
        start = time.perf_counter()
        a @ a
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held: on its GPU, or in all without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Options of glibc's mallopt (malloc.h).
MALLOPT = {"trim_threshold": -1, "top_pad": -2, "mmap_threshold": -3, "mmap_max": -4}


def reuse_memory() -> None:
    """Lets the C library keep freed blocks instead of returning them to the system: on a CPU,
    touching fresh pages costs more than most elementwise operations (measured: a dense output
    matrix and its loss run 2.6x faster). Does nothing where there is no glibc."""
    _set_allocator(mmap_max=0, trim_threshold=2**31 - 1, top_pad=64 << 20)


def return_memory() -> None:
    """Puts glibc's own settings back, for measurements of what does without `reuse_memory`: blocks
    from 32 MiB on are mapped afresh each time, which is where glibc by itself arrives at most."""
    _set_allocator(
        mmap_max=65536, mmap_threshold=32 << 20, trim_threshold=64 << 20, top_pad=128 << 10
    )


def _set_allocator(**options: int) -> None:
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    for name, value in options.items():
        libc.mallopt(MALLOPT[name], value)
