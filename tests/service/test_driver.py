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

SCORE = {"value": 0.5, "stderr": 0.1}


TABLE = InfluenceTable(
    np.array([1.0, -1.0]).reshape(1, 2, 1, 1, 1) * np.ones((1, 2, 4, 2, 4)),
    np.full((2, 4), 10.0),
    np.full((2, 4), 10.0),
    np.ones(2),
    np.zeros((2, 2)),
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
        return record("sft", self.config.root / str(len(self.trained)) / "sft", {"tokens": sum(volumes.values())})

    def stage(self, stage: Stage, name: str, work: Any, attempts: int = 1) -> Record:
        if stage.kind == "benchmark":
            self.scored.append(name)
            return record("benchmark", self.config.root / "b", SCORE)
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
    longer = config.benchmarks[0].model_copy(update={"name": "long", "size": 9, "seed": 5000})
    config = config.model_copy(update={"benchmarks": [*config.benchmarks, longer]})
    run, found = quick(config, outcome, [3.0, 2.0, 1.0], iterations=2)
    assert [name for name, _ in run.trained] == ["D0", "D1", "D2"]
    assert [volumes for _, volumes in run.trained] == [i.volumes for i in found.iterations]
    assert len({tuple(volumes.values()) for _, volumes in run.trained}) == 3
    assert {sum(volumes.values()) for _, volumes in run.trained} == {18}
    assert run.scored == [f"D{n} benchmark {name}" for n in range(3) for name in ("long", "sums")]
    assert found.iterations[0].benchmark
    assert found.iterations[0].benchmark.result == {"sums": SCORE, "long": SCORE}


def test_small_rises_cannot_add_up_and_the_best_mixture_is_kept(config: Config, outcome: Outcome) -> None:
    """D1 lies 1.5 % above D0 and D2 1.5 % above D1: within `max_rise` of 2 % one by one, but not of the lowest."""
    _, found = quick(config, outcome, [1.0, 1.015, 1.030, 1.01], iterations=2, max_rise=0.02, retries=1)
    assert [i.accepted for i in found.iterations] == [True, True, False, True]
    assert found.equilibrium is found.iterations[0]
    assert found.iterations[3].volumes != found.iterations[2].volumes
    grown = [i.volumes["math"] - found.iterations[0].volumes["math"] for i in found.iterations[1:]]
    assert grown[2] == pytest.approx(grown[0] / 2, abs=1), "the retreat starts from D0, with m/2"


def test_the_last_mixture_is_not_the_result_if_an_earlier_one_was_better(config: Config, outcome: Outcome) -> None:
    _, found = quick(config, outcome, [3.0, 1.0, 1.005], iterations=2, max_rise=0.01)
    assert [i.accepted for i in found.iterations] == [True, True, True]
    assert found.equilibrium.name == "D1"
