"""What the data layer raises."""

from __future__ import annotations

from rondo.errors import UserError


class DataError(UserError):
    """Data that cannot be used. The message names the file or key, its value, and what is right."""
