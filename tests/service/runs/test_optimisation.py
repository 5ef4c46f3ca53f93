"""What the optimisation trains, in which order, on stages that come back at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ideal.config.config import Config
from ideal.influence.table import InfluenceTable
from service.outcome import Outcome
from service.runs.optimisation import optimise
from service.stages.reference import ReferenceLoss
from service.stages.sft import Sft
from service.store.layout import TABLE
from service.store.stage import Stage
from tests.service.made import Told

SCORE = {"value": 0.5, "stderr": 0.1}
HELPFUL = InfluenceTable(
    np.array([1.0, -1.0]).reshape(1, 2, 1, 1, 1) * np.ones((1, 2, 4, 2, 4)),
    np.full((2, 4), 10.0),
    np.full((2, 4), 10.0),
    np.ones(2),
    np.zeros((2, 2)),
)
"""More of `math` helps, without a doubt."""


def quick(config: Config, outcome: Outcome, losses: list[float], **settings: float) -> tuple[Told, Outcome]:
    """A run whose SFTs have these reference losses, one after another."""
    left = iter(losses)

    def answer(stage: Stage[Any], folder: Path) -> Mapping[str, Any]:
        match stage.kind:
            case "examples":
                account = {"train": {"rows": 24, "rejected": {}}, "reference": {"rows": 24, "rejected": {}}}
                return dict.fromkeys(outcome.data.result, account)
            case "data":
                return {name: {**row, "content": name} for name, row in outcome.data.result.items()}
            case "reference":
                assert isinstance(stage, ReferenceLoss)
                loss = next(left)
                return {name: {"loss": loss, "tokens": 9} for name in ("math", "chat")}
            case "influence":
                HELPFUL.save(folder / TABLE)
            case "benchmark":
                return SCORE
        return {"tokens": 1}

    equilibrium = config.equilibrium.model_copy(update={"m": 0.5, **settings})
    run = Told(config.root, answer)
    return run, optimise(config.model_copy(update={"equilibrium": equilibrium}), run)


def trained(run: Told) -> list[dict[str, int]]:
    """The volumes of every SFT."""
    return [stage.volumes for _, stage in run.asked if isinstance(stage, Sft)]


def test_every_mixture_is_trained_on_all_of_it_and_scored(config: Config, outcome: Outcome) -> None:
    longer = config.benchmarks[0].model_copy(update={"name": "long", "size": 9, "seed": 5000})
    config = config.model_copy(update={"benchmarks": [*config.benchmarks, longer]})
    run, found = quick(config, outcome, [3.0, 2.0, 1.0], iterations=2)
    assert run.names("sft") == ["D0 SFT", "D1 SFT", "D2 SFT"]
    assert trained(run) == [i.volumes for i in found.iterations]
    assert len({tuple(volumes.values()) for volumes in trained(run)}) == 3
    assert {sum(volumes.values()) for volumes in trained(run)} == {18}
    assert run.names("influence") == ["D0 influence", "D1 influence"]
    assert run.names("benchmark") == [f"D{n} benchmark {name}" for n in range(3) for name in ("long", "sums")]
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
