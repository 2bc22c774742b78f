"""What the data layer raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rondo.errors import UserError


class DataError(UserError):
    """Data that cannot be used. The message names the file or key, its value, and what is right."""


@contextmanager
def told_of(key: str) -> Iterator[None]:
    """Within it, DataErrors begin with the recipe's key that led there."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
