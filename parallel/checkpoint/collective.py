"""Decisions that all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from rondo.errors import UserError

T = TypeVar("T")


class CheckpointError(UserError):
    """A checkpoint could not be written, read or used; raised on all ranks alike."""


class Collective:
    """All ranks, talking over a gloo group of their own; alone without a process group.

    Everything here is collective. A group of its own keeps these exchanges apart from the
    training's, so that they may run in a background thread.
    """

    def __init__(self) -> None:
        alone = not (dist.is_available() and dist.is_initialized())
        self.group = None if alone else dist.new_group(backend="gloo")
        self.rank = 0 if alone else dist.get_rank()
        self.size = 1 if alone else dist.get_world_size()

    def each(self, what: str, function: Callable[[], T]) -> list[T]:
        """Runs `function` on every rank and returns the results by rank.

        Raises:
            CheckpointError: it failed on some rank (every rank raises, with what failed where).
        """
        outcome: tuple[str | None, Any]
        try:
            outcome = (None, function())
        except Exception as error:
            outcome = (_text(error), None)
        outcomes: list[tuple[str | None, Any]] = [outcome]
        if self.group is not None:
            outcomes = [outcome] * self.size
            with self.reporting(what):
                dist.all_gather_object(outcomes, outcome, group=self.group)
        failures = {rank: text for rank, (text, _) in enumerate(outcomes) if text is not None}
        if failures:
            raise CheckpointError(self._describe(what, failures))
        return [result for _, result in outcomes]

    def first(self, what: str, function: Callable[[], T]) -> T:
        """Runs `function` on rank 0 and returns its result on every rank; raises as `each`."""
        own: Callable[[], Any] = function if self.rank == 0 else lambda: None
        return self.each(what, own)[0]

    @contextmanager
    def reporting(self, what: str) -> Iterator[None]:
        """Errors of torch.distributed (already the same on all ranks where
        torch.distributed.checkpoint raised them) as CheckpointError."""
        try:
            yield
        except CheckpointException as error:
            failures = {rank: _text(cause) for rank, (cause, _) in error.failures.items()}
            raise CheckpointError(self._describe(what, failures)) from error
        except RuntimeError as error:
            raise CheckpointError(f"{what}: lost another rank: {error}") from error

    def _describe(self, what: str, failures: dict[int, str]) -> str:
        if len(failures) == self.size and len(set(failures.values())) == 1:
            return f"{what}: {failures[0]}"
        return f"{what}: " + "; ".join(f"rank {rank}: {text}" for rank, text in failures.items())


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
