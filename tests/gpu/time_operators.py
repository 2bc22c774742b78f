"""Times the sequence operators forward and backward on a CUDA device, beside torch's attention."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from rondo.kernels import gated_delta_rule, gated_linear_attention, l2_norm

HEADS, DIM = 16, 128
SHAPES = ((8, 2048), (2, 8192))


def milliseconds(run: Callable[[], torch.Tensor], repeats: int = 10) -> float:
    """Best time of a forward and backward pass."""
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run().float().sum().backward()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def main() -> None:
    """Prints a row a shape."""
    print(torch.cuda.get_device_name(), torch.__version__)
    print("batch x time       attention  linear attention  delta rule   (ms, forward + backward)")
    for batch, length in SHAPES:
        shape = (batch, length, HEADS, DIM)
        q, k, v = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        decay = -torch.rand(shape[:3], device="cuda")
        beta = torch.rand(shape[:3], device="cuda")
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        figures = (
            milliseconds(lambda a=heads_first: F.scaled_dot_product_attention(*a, is_causal=True)),
            milliseconds(lambda a=(q, k, v, decay): gated_linear_attention(*a)[0]),
            milliseconds(
                lambda a=(q, k, v, beta, decay): gated_delta_rule(a[0], l2_norm(a[1]), *a[2:])[0]
            ),
        )
        print(f"{batch:5} x {length:6} {figures[0]:12.2f} {figures[1]:17.2f} {figures[2]:11.2f}")


if __name__ == "__main__":
    main()
