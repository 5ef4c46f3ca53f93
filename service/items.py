"""A score by item beside a benchmark's record: how much of it is due to the items that happened to be asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ITEMS = "items.json"
BY_ITEM = "by_item"


def keep(folder: Path, score: Mapping[str, Any]) -> dict[str, Any]:
    """Write a benchmark's score by item into its stage's folder; returns what the record holds."""
    (folder / ITEMS).write_text(json.dumps(score[BY_ITEM]))
    return {key: value for key, value in score.items() if key != BY_ITEM}


def read(folder: Path) -> list[float] | None:
    """Each item's part of the score, whose mean is the score; None where it isn't such a mean."""
    found: list[float] | None = json.loads((folder / ITEMS).read_text())
    return found
