"""`card.json`: what a prepared folder holds, and what it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rondo.pretrain.data.errors import DataError

CARD = "card.json"


def read_card(folder: Path) -> dict[str, Any]:
    """`card.json` of a prepared folder. Raises DataError when it is damaged."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / CARD}: cannot be read: {error}") from None
    if not isinstance(card, dict):
        raise DataError(f"{folder / CARD}: expected a JSON object, got {type(card).__name__}")
    return card
