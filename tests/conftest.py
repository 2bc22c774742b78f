"""Settings that every test shares."""

import sys
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Lets no test inherit compiled code: the shapes of an earlier one would turn dynamic here.

    Guards on dynamic shapes of unrolled loops take sympy minutes instead of seconds.
    """
    yield
    if "torch._dynamo.convert_frame" in sys.modules:
        torch.compiler.reset()
