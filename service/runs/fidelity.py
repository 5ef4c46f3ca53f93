"""How far influence can be trusted: every solver's prediction against what retraining does.

For each seed the mixture D0 is trained, and again with each domain's volume moved up and down: every training is a
stage of its own, so they are shared, resumed and run beside each other. Each solver's influence is computed at that
seed's D0. What is compared, and how, is in ``ideal.analysis.fidelity``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ideal.analysis.fidelity import moved
from ideal.config.config import Config
from ideal.data.domains import starting_volumes
from ideal.influence.table import Array, InfluenceTable
from service.outcome import Findings
from service.runs.mixtures import Inputs
from service.runs.runner import Recorded, Runner, side_by_side
from service.stages.prediction import Prediction, PredictionResult
from service.stages.retraining import Retraining
from service.store.layout import TABLE
from service.store.stage import Identified, Record
from service.store.store import Unfinished

Trained = Record[dict[str, Any]]


class Fidelity:
    """All retrainings and predictions of a config."""

    def __init__(self, config: Config, run: Runner) -> None:
        inputs = Inputs(config, run)
        self.config, self.run, self.base, self.data = config, run, inputs.base, inputs.data
        self.volumes = starting_volumes(config, self.data.result)
        self.seeds = range(config.seed, config.seed + config.fidelity.seeds)

    def findings(self) -> Findings:
        """Train, predict, and collect.

        Raises:
            BadInput: something in the config or the data doesn't hold.
        """
        config, at_once = self.config, self.run.at_once.trainings
        first = [(s, "", "", 0) for s in self.seeds]
        moves = [
            (s, mode, domain, sign)
            for s in self.seeds
            for mode in config.fidelity.modes
            for domain in self.volumes
            for sign in (1, -1)
        ]
        keys = [*first, *moves]
        trained = side_by_side([partial(self._trained, *key) for key in keys], at_once)
        again = dict(zip(keys, trained, strict=True))
        base = {s: again.pop((s, "", "", 0)) for s in self.seeds}
        asked = [(s, solver) for s in self.seeds for solver in config.fidelity.solvers]
        predicted = side_by_side([partial(self._predicted, s, solver, base[s]) for s, solver in asked], at_once)
        return self._collect(list(self.seeds), base, again, dict(zip(asked, predicted, strict=True)))

    def _trained(self, seed: int, mode: str, domain: str, sign: int) -> Trained:
        """SFT on D0, its model kept; or with one domain's volume moved up or down."""
        change = sign * self.config.fidelity.change
        volumes = moved(self.volumes, domain, change, mode) if sign else self.volumes
        name = f"{domain} {change:+.0%}, fixed {mode}" if sign else "D0"
        stage = retraining(self.config, seed, volumes, self.base, self.data, keep=not sign)
        return self.run(stage, f"seed {seed} {name}")

    def _predicted(self, seed: int, solver: str, trained: Trained) -> Record[PredictionResult]:
        settings = self.config.compared(solver)
        stage = Prediction(
            influence=Identified(settings, settings.of_the_table()),
            volumes=self.volumes,
            seed=seed,
            trained=trained,
            data=self.data,
        )
        return self.run(stage, f"seed {seed} {solver}")

    def _collect(
        self,
        seeds: list[int],
        first: dict[int, Trained],
        again: dict[tuple[int, str, str, int], Trained],
        predictions: dict[tuple[int, str], Record[PredictionResult]],
    ) -> Findings:
        config, domains = self.config, list(self.volumes)

        def losses(record: Trained) -> Array:
            return np.array([record.result[domain]["loss"] for domain in domains])

        def derivative(s: int, mode: str, domain: str) -> Array:
            up, down = (again[s, mode, domain, sign] for sign in (1, -1))
            sizes = [moved(self.volumes, domain, x * config.fidelity.change, mode)[domain] for x in (1, -1)]
            return np.asarray((losses(up) - losses(down)) / ((sizes[0] - sizes[1]) / self.volumes[domain]))

        seconds = {
            solver: float(np.mean([predictions[s, solver].seconds for s in seeds]))
            for solver in config.fidelity.solvers
        }
        return Findings(
            domains,
            dict(self.volumes),
            [self.data.result[domain]["tokens_per_example"] for domain in domains],
            {
                mode: np.array([[derivative(s, mode, domain) for domain in domains] for s in seeds])
                for mode in config.fidelity.modes
            },
            np.array([losses(first[s]) for s in seeds]),
            {
                solver: [InfluenceTable.load(predictions[s, solver].folder / TABLE) for s in seeds]
                for solver in config.fidelity.solvers
            },
            {**seconds, "training": float(np.mean([record.seconds for record in again.values()]))},
        )


def recorded(config: Config, run: Recorded) -> list[Trained]:
    """The recorded trainings that keep their weights."""
    try:
        study = Fidelity(config, run)
    except Unfinished:
        return []
    kept = [retraining(config, seed, study.volumes, study.base, study.data, keep=True) for seed in study.seeds]
    return [found for stage in kept if (found := run.store.find(stage))]


def retraining(
    config: Config, seed: int, volumes: dict[str, int], base: Record[Any], data: Record[Any], keep: bool
) -> Retraining:
    """SFT on a mixture and its reference losses.

    Args:
        keep: the trained model, too.
    """
    averaged = config.influence.averaged if keep else 0.0
    return Retraining(sft=config.sft, averaged=averaged, volumes=volumes, seed=seed, keep=keep, base=base, data=data)
