"""One SLURM cluster for all tests of a process; they are skipped where there is no SLURM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rondo.tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster, running."""
    if missing():
        pytest.skip(missing())
    with Cluster() as running:
        yield running
