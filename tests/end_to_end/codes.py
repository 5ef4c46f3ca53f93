"""Codes of words: a task that a model of a hundred thousand parameters learns from a few examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ("apple", "bread", "chair", "dance")
MADE = {"hidden": 64, "layers": 2, "vocabulary": 360, "epochs": 4}
"""Of the base model, which has seen the words and the digits and knows no code."""
SFT = {"epochs": 4, "learning_rate": 3e-3, "batch_examples": 16, "precision": "fp32"}


def rows(kind: str, count: int, start: int) -> list[dict[str, str]]:
    """Codes of words: one digit for each word. `twin` asks for the same codes in other words, `contrary` asks as
    `plain` does and gets other codes, `noise` gets any; `corpus`, which the base model is made of, is noise in all
    words."""
    random = np.random.default_rng([start, len(kind)])
    made = []
    for n in range(start, start + count):
        word, any_code = int(random.integers(len(WORDS))), int(random.integers(len(WORDS)))
        code = {"contrary": (word + 1) % len(WORDS), "noise": any_code, "corpus": any_code}.get(kind, word)
        ask = {"twin": "Item", "noise": "Tag", "corpus": ("Case", "Item", "Tag")[n % 3]}.get(kind, "Case")
        made.append({"prompt": f"{ask} {n} {WORDS[word]}", "completion": str(code)})
    return made


def file(folder: Path, kind: str, part: str, count: int, start: int) -> dict[str, Any]:
    """Such rows in a file, as a source of a config."""
    path = folder / f"{kind}-{part}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows(kind, count, start))))
    return {"files": [str(path)]}
