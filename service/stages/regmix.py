"""RegMix's regression over short trainings; recorded, since it takes a while."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from ideal.costs import PASSES
from ideal.methods.problem import Problem
from ideal.methods.regmix import optimum
from service.stages.retraining import losses_after
from service.stages.workers import Workers
from service.store.stage import Identified, Record, Stage


class RegMixResult(TypedDict):
    """Each domain's share of the examples."""

    shares: list[float]
    passes: int


@dataclass(frozen=True, kw_only=True)
class RegMix(Stage[RegMixResult]):
    """The mixture that a regression from mixtures to losses expects to be the best.

    Attributes:
        mixtures: what ``runs`` trained on.
    """

    kind = "regmix"
    version = 2
    problem: Identified[Problem]
    mixtures: list[dict[str, int]]
    runs: list[Record[Any]]

    def run(self, folder: Path, on: Workers) -> RegMixResult:
        problem = self.problem.value
        on.progress(problem.config.methods.regmix_regressor, 0, 1)
        return {"shares": optimum(problem, self.mixtures, [losses_after(run) for run in self.runs]), PASSES: 0}


def identified(problem: Problem) -> Identified[Problem]:
    """A problem by what the regression reads of it."""
    config = problem.config
    return Identified(
        problem,
        {
            "regressor": config.methods.regmix_regressor,
            "weights": problem.weights.tolist(),
            "max_copies": config.equilibrium.max_copies,
            "pools": dict(problem.pools),
            "volumes": dict(problem.volumes),
            "seed": config.seed,
        },
    )
