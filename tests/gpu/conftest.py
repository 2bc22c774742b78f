"""Tests on a GPU run the kernels of recurrences that "auto" leaves alone with a doubtful Triton."""

from __future__ import annotations

import pytest

from rondo.kernels import backend


@pytest.fixture(autouse=True)
def whatever_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be wrong is what is to be tested."""
    monkeypatch.setattr(backend, "triton_doubt", lambda device: None)
