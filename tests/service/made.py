"""Stages and runners that are made up: what a test runs without a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.runs.runner import AtOnce
from service.stages.workers import Workers
from service.store.digests import Digests
from service.store.stage import R_co, Record, Stage


@dataclass(frozen=True, kw_only=True)
class Made(Stage[dict[str, Any]]):
    """A stage of any settings and inputs; its work is given to the store."""

    kind = "sft"
    version = 1
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: list[Record[Any]] = field(default_factory=list)

    def run(self, folder: Path, on: Any) -> dict[str, Any]:
        raise AssertionError("a test gives its work to the store")


class Told:
    """A runner whose stages come back at once with what a test says, as if they had just run.

    Attributes:
        asked: every stage with its name, in order.
    """

    at_once = AtOnce()

    def __init__(self, folder: Path, answer: Callable[[Stage[Any], Path], Mapping[str, Any]]) -> None:
        self.folder, self.answer = folder, answer
        self.checksum = Digests(folder / "digests.jsonl").of
        self.asked: list[tuple[str, Stage[Any]]] = []

    def __call__(self, stage: Stage[R_co], name: str) -> Record[R_co]:
        self.asked.append((name, stage))
        folder = self.folder / "stages" / str(len(self.asked))
        folder.mkdir(parents=True)
        result: Any = self.answer(stage, folder)
        return Record(stage.kind, stage.fingerprint, folder, result, 1.0, fresh=True)

    def scored(self) -> None: ...

    def names(self, kind: str) -> list[str]:
        """Of all stages of a kind that were asked for."""
        return [name for name, stage in self.asked if stage.kind == kind]


def silent(*state: Any) -> None:
    """No progress."""


def workers(config: Any, cluster: Any, progress: Any = silent) -> Workers:
    """What a stage runs on that scores nothing."""
    nobody: Any = None
    return Workers(config=config, cluster=cluster, progress=progress, engines=nobody)
