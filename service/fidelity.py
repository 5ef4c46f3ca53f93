"""How far influence can be trusted: every solver's prediction against what retraining does.

For each seed the mixture D0 is trained, and again with each domain's volume moved up and down: every training is a
stage of its own, so they are shared, resumed and run beside each other. Each solver's influence is computed at that
seed's D0. What is compared, and how, is in ``ideal.fidelity``.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from ideal.domains import starting_volumes
from ideal.fidelity import moved
from ideal.influence import Array, InfluenceTable
from service.files import TABLE
from service.progress import Reporter
from service.retraining import Piece, retrainers, training, training_stage
from service.stages import Record, Stage, Unfinished
from service.study import Study


@dataclass(frozen=True)
class Findings:
    """What the stages gave; M domains, R = M reference sets, S seeds.

    Attributes:
        volumes: D0.
        tokens: [M] mean supervised tokens of a domain's examples.
        actual: [S, M, R] dQ_r/dβ_j by mode.
        base: [S, R] reference losses at D0.
        tables: each seed's influence by solver.
        seconds: of one seed's influence by solver, and of one training under `training`.
    """

    domains: list[str]
    volumes: dict[str, int]
    tokens: list[float]
    actual: dict[str, Array]
    base: Array
    tables: dict[str, list[InfluenceTable]]
    seconds: dict[str, float]


class Fidelity(Study):
    """All retrainings and predictions of a config."""

    def run(self) -> Findings:
        """Train, predict, and collect.

        Raises:
            BadInput: something in the config or the data doesn't hold.
        """
        config = self.config
        self.base = self.base_model()
        self.data = self.example_sets()
        self.volumes = starting_volumes(config, self.data.result)
        seeds = [config.seed + s for s in range(config.fidelity.seeds)]
        with retrainers(config, self.cluster, self.base.folder, self.data.folder) as submit:
            first = {s: submit(self._training(s, self.volumes, "D0", keep=True)) for s in seeds}
            again = {
                (s, mode, domain, sign): submit(
                    self._training(
                        s,
                        moved(self.volumes, domain, sign * config.fidelity.change, mode),
                        f"{domain} {sign * config.fidelity.change:+.0%}, fixed {mode}",
                    )
                )
                for s in seeds
                for mode in config.fidelity.modes
                for domain in self.volumes
                for sign in (1, -1)
            }
            predictions = {
                (s, solver): submit(self._prediction(s, solver, first[s]))
                for s in seeds
                for solver in config.fidelity.solvers
            }
            return self._collect(
                seeds,
                {s: future.result() for s, future in first.items()},
                {key: future.result() for key, future in again.items()},
                {key: future.result() for key, future in predictions.items()},
            )

    def kept(self) -> list[Record]:
        """The recorded trainings that keep their weights."""
        config = self.config
        try:
            self.base = self.base_model()
            self.data = self.example_sets()
        except Unfinished:
            return []
        volumes = starting_volumes(config, self.data.result)
        seeds = range(config.seed, config.seed + config.fidelity.seeds)
        stages = [training_stage(config, seed, volumes, self.base, self.data, keep=True) for seed in seeds]
        return [found for stage in stages if (found := self.store.find(stage))]

    def _training(self, seed: int, volumes: dict[str, int], name: str, keep: bool = False) -> Piece:
        stage = training_stage(self.config, seed, volumes, self.base, self.data, keep)
        return lambda actor: self.stage(stage, f"seed {seed} {name}", training(actor, volumes, seed, keep))

    def _prediction(self, seed: int, solver: str, trained: Future[Record]) -> Piece:
        settings = self.config.compared(solver)

        def piece(actor: Any) -> Record:
            at = trained.result()
            stage = Stage(
                "prediction",
                {"influence": settings.of_the_table(), "seed": seed, "volumes": self.volumes},
                {"training": at.fingerprint, "data": self.data.fingerprint},
            )

            def work(folder: Path, progress: Reporter) -> dict[str, Any]:
                done: dict[str, Any] = ray.get(
                    actor.predict.remote(at.folder, settings, self.volumes, seed, folder, progress)
                )
                return done

            return self.stage(stage, f"seed {seed} {solver}", work)

        return piece

    def _collect(
        self,
        seeds: list[int],
        first: dict[int, Record],
        again: dict[tuple[int, str, str, int], Record],
        predictions: dict[tuple[int, str], Record],
    ) -> Findings:
        config, domains = self.config, list(self.volumes)

        def losses(record: Record) -> Array:
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
