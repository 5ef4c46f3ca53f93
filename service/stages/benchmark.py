"""A benchmark's score of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from ideal.config.inputs import BenchmarkConfig
from service.stages.content import Checksum, included_content
from service.stages.workers import Workers
from service.store.stage import Identified, Record, Stage

ITEMS = "items.json"
BY_ITEM = "by_item"


class Score(TypedDict):
    """A metric's value over a number of items, and its standard error.

    Attributes:
        failed: answers that the scorer failed on; they score 0.
    """

    metric: str
    value: float
    stderr: float | None
    items: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class Benchmark(Stage[Score]):
    """A benchmark's score of a checkpoint; each item's part of it goes to ``items.json``.

    Attributes:
        max_tokens: the longest prompt and answer together.
        model: an SFT's record, or the base model's.
    """

    kind = "benchmark"
    version = 3
    benchmark: Identified[BenchmarkConfig]
    max_tokens: int
    seed: int
    model: Record[Any]

    def run(self, folder: Path, on: Workers) -> Score:
        found = on.engines.score(
            self.benchmark.value, checkpoint=self.model.folder, seed=self.seed, progress=on.progress
        )
        score: Score = kept(folder, found)
        return score


def identified(benchmark: BenchmarkConfig, checksum: Checksum) -> Identified[BenchmarkConfig]:
    """A benchmark by what its score depends on, with the content of its own task files in place of their folder."""
    settings = benchmark.model_dump(mode="json", exclude={"name", "include"})
    return Identified(benchmark, {**settings, "include": included_content(benchmark, checksum)})


def kept(folder: Path, score: Mapping[str, Any]) -> Any:
    """Write a score by item into its stage's folder; returns what the record holds."""
    (folder / ITEMS).write_text(json.dumps(score[BY_ITEM]))
    return {key: value for key, value in score.items() if key != BY_ITEM}


def by_item(folder: Path) -> list[float] | None:
    """Each item's part of the score, whose mean is the score; None where it isn't such a mean."""
    found: list[float] | None = json.loads((folder / ITEMS).read_text())
    return found
