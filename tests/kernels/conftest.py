"""Checks on whatever Triton's interpreter runs in these tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


class Spans:
    """The memory of the tensors that a kernel was given."""

    def __init__(self, tensors: list[Any]) -> None:
        spans = sorted(_span(x) for x in tensors if isinstance(x, torch.Tensor) and x.numel())
        self.starts = np.array([start for start, _ in spans], dtype=np.uint64)
        # Of tensors that share memory the furthest end counts.
        ends = np.array([end for _, end in spans], dtype=np.uint64)
        self.ends = np.maximum.accumulate(ends) if len(ends) else ends

    def check(self, what: str, pointers: Any, mask: Any) -> None:
        """Raises where one that is not masked is in none of them."""
        inside = np.broadcast_to(mask.data, pointers.data.shape)
        found = pointers.data[inside]
        if not found.size:
            return
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at = np.searchsorted(self.starts, found, side="right") - 1
        if (at < 0).any() or (found + np.uint64(width) > self.ends[np.maximum(at, 0)]).any():
            raise AssertionError(f"a kernel would {what} what is in none of its tensors")


def _span(x: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


@pytest.fixture(autouse=True)
def kernels_stay_inside_their_tensors() -> Iterator[None]:
    """A read past the end gives anything at all on a GPU, and mostly nothing bad here."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    copy, load, store = (
        executor._init_args_hst,
        builder.create_masked_load,
        builder.create_masked_store,
    )
    spans = Spans([])

    def copied(self: Any, given: Any, named: dict[str, Any]) -> Any:
        nonlocal spans
        arguments, keywords = copy(self, given, named)
        spans = Spans([*arguments, *keywords.values()])
        return arguments, keywords

    def loaded(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        spans.check("read", pointers, mask)
        return load(self, pointers, mask, *others)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        spans.check("write", pointers, mask)
        return store(self, pointers, value, mask, *others)

    executor._init_args_hst = copied
    builder.create_masked_load, builder.create_masked_store = loaded, stored
    yield
    executor._init_args_hst = copy
    builder.create_masked_load, builder.create_masked_store = load, store
