"""What the optimisation trains, in which order, on stages that come back at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ideal.config import Config
from ideal.influence import InfluenceTable
from service.cluster import Cluster
from service.driver import Optimisation
from service.mixtures import Iteration, Outcome
from service.stages import Record, Stage, Store
from tests.service.conftest import record

SCORES = {"sums": {"value": 0.5, "stderr": 0.1}}


TABLE = InfluenceTable(
    np.array([1.0, -1.0]).reshape(1, 2, 1, 1, 1) * np.ones((1, 2, 4, 2, 4)),
    np.full((2, 4), 10.0),
    np.full((2, 4), 10.0),
    np.ones(2),
)
"""More of `math` helps, without a doubt."""


class Quick(Optimisation):
    """Stages that are made up; every SFT's reference loss is the next of ``losses``."""

    def __init__(self, config: Config, outcome: Outcome, losses: list[float]) -> None:
        super().__init__(config, Cluster(1, 0, 1, 1, 1, 1), Store(config.root), None)  # type: ignore[arg-type]
        self.made, self.losses = outcome, losses
        self.trained: list[tuple[str, dict[str, int]]] = []
        self.scored: list[str] = []

    def base_model(self) -> Record:
        return record("model", self.config.root / "model", {})

    def example_sets(self) -> Record:
        return self.made.data

    def sft(self, volumes: dict[str, int], name: str) -> Record:
        self.trained.append((name, volumes))
        return record("sft", self.config.root / f"sft{len(self.trained)}", {"tokens": sum(volumes.values())})

    def stage(self, stage: Stage, name: str, work: Any, attempts: int = 1) -> Record:
        if stage.kind == "benchmark":
            self.scored.append(name)
            return record("benchmark", self.config.root / "b", SCORES)
        loss = self.losses[len(self.trained) - 1]
        return record(stage.kind, self.config.root / name, {d: {"loss": loss, "tokens": 9} for d in ("math", "chat")})

    def _influence(self, current: Iteration) -> None:
        current.table = TABLE
        current.influence = record("influence", self.config.root / "i", {})


def quick(config: Config, outcome: Outcome, losses: list[float], **settings: float) -> tuple[Quick, Outcome]:
    equilibrium = config.equilibrium.model_copy(update={"m": 0.5, **settings})
    run = Quick(config.model_copy(update={"equilibrium": equilibrium}), outcome, losses)
    return run, run.run()


def test_every_mixture_is_trained_on_all_of_it_and_scored(config: Config, outcome: Outcome) -> None:
    run, found = quick(config, outcome, [3.0, 2.0, 1.0], iterations=2)
    assert [name for name, _ in run.trained] == ["D0", "D1", "D2"]
    assert [volumes for _, volumes in run.trained] == [i.volumes for i in found.iterations]
    assert len({tuple(volumes.values()) for _, volumes in run.trained}) == 3
    assert {sum(volumes.values()) for _, volumes in run.trained} == {18}
    assert run.scored == ["D0 benchmarks", "D1 benchmarks", "D2 benchmarks"]


def test_scouts_see_a_share_and_the_last_mixture_is_trained_whole(config: Config, outcome: Outcome) -> None:
    """The share is of the same mixtures; only what is trained whole has a score, and only that is no search."""
    run, found = quick(config, outcome, [3.0, 2.0, 1.0, 0.5], iterations=2, scout=0.5)
    assert [name for name, _ in run.trained] == ["D0 ×0.5", "D1 ×0.5", "D2 ×0.5", "D2"]
    assert [sum(volumes.values()) for _, volumes in run.trained] == [9, 9, 9, 18]
    whole, _ = quick(config, outcome, [3.0, 2.0, 1.0], iterations=2)
    assert [i.volumes for i in found.iterations[:3]] == [volumes for _, volumes in whole.trained]
    assert run.trained[-1][1] == found.equilibrium.volumes == found.iterations[2].volumes
    assert run.scored == ["D2 benchmarks"]
    assert (found.equilibrium.name, found.equilibrium.loss) == ("D2", pytest.approx(0.5))
    assert sum(r.result.get("tokens", 0) for r in found.search if r.kind == "sft") == 27


def test_a_rejected_scout_is_neither_kept_nor_scored(config: Config, outcome: Outcome) -> None:
    run, found = quick(config, outcome, [1.0, 2.0, 3.0, 0.9], iterations=2, scout=0.5, retries=1)
    assert [i.accepted for i in found.iterations] == [True, False, False, True]
    assert found.equilibrium.volumes == found.iterations[0].volumes
    assert run.trained[-1] == ("D0", found.iterations[0].volumes)
    assert run.scored == ["D0 benchmarks"]
    assert "D0 is kept" in found.stopped
