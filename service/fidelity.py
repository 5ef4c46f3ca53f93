"""How far influence can be trusted: every solver's prediction against what retraining does.

For each seed the mixture D0 is trained, and again with each domain's volume moved up and down: every training is a
stage of its own, so they are shared, resumed and run beside each other. Each solver's influence is computed at that
seed's D0. What is compared, and how, is in ``ideal.fidelity``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from safetensors.torch import load_file

from ideal.config import Config, InfluenceConfig
from ideal.curvature.layers import tracked_layers
from ideal.domains import starting_volumes
from ideal.examples import ExampleSet
from ideal.fidelity import moved
from ideal.influence import Array, InfluenceTable
from ideal.model import DTYPES, device, load_model
from ideal.solvers import Sampled, influence_tables
from ideal.training import AVERAGE, DAMPING, Trainer, train
from service.cluster import Reservation
from service.data import MODEL, for_influence, train_file
from service.influence import TABLE
from service.progress import Reporter
from service.reference import losses_of, means
from service.sample import Sample
from service.stages import Record, Stage
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
        with self._workers() as submit:
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

    @contextmanager
    def _workers(self) -> Iterator[Callable[[Callable[[Any], Record]], Future[Record]]]:
        """Actors that each take one piece of work at a time; yields how to hand them some."""
        count = self.cluster.influence_workers
        bundle = self.cluster.per_worker(1)
        with Reservation([bundle] * count, self.config.resources.wait_seconds, "fidelity") as reserved:
            make = Retrainer.options(  # type: ignore[attr-defined]
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_restarts=10,
                max_task_retries=-1,  # a lost node costs several at once; `max_restarts` is the limit
                scheduling_strategy=PlacementGroupSchedulingStrategy(reserved),
            )
            free: Queue[Any] = Queue()
            for _ in range(count):
                free.put(make.remote(self.base.folder / MODEL, self.data.folder, self.config))

            def work(piece: Callable[[Any], Record]) -> Record:
                actor = free.get()
                try:
                    return piece(actor)
                finally:
                    free.put(actor)

            pool = ThreadPoolExecutor(count)
            try:
                yield lambda piece: pool.submit(work, piece)
            finally:
                pool.shutdown(cancel_futures=True)
                while not free.empty():
                    ray.kill(free.get())

    def _training(self, seed: int, volumes: dict[str, int], name: str, keep: bool = False) -> Callable[[Any], Record]:
        config = self.config
        settings = {
            "sft": config.sft.model_dump(mode="json"),
            "seed": seed,
            "volumes": volumes,
            "keep": keep,
        }
        if keep:
            settings["averaged"] = config.influence.averaged
        stage = Stage("retraining", settings, {"model": self.base.fingerprint, "data": self.data.fingerprint})

        def piece(actor: Any) -> Record:
            def work(folder: Path, progress: Reporter) -> dict[str, Any]:
                found: dict[str, Any] = ray.get(actor.retrain.remote(volumes, seed, folder if keep else None, progress))
                return found

            return self.stage(stage, f"seed {seed} {name}", work)

        return piece

    def _prediction(self, seed: int, solver: str, trained: Future[Record]) -> Callable[[Any], Record]:
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


@ray.remote
class Retrainer:
    """Trains small models and computes their influence, one at a time; its methods can be repeated."""

    def __init__(self, base: Path, data: Path, config: Config) -> None:
        self.base, self.data, self.config = base, data, config
        self.device = device()
        if self.device.type == "cpu":
            torch.set_num_threads(1)

    def retrain(self, volumes: dict[str, int], seed: int, keep: Path | None, progress: Reporter) -> dict[str, Any]:
        """SFT on a mixture in this process.

        Args:
            keep: where the trained model goes; None leaves nothing but the losses.

        Returns:
            each reference set's loss (nats per token) and tokens.
        """
        torch.manual_seed(seed)
        config = self.config
        pools = {domain: ExampleSet.load(train_file(self.data, domain)) for domain in volumes}
        trainer = Trainer(self.base, config.sft, self.device, config.resources.batch_tokens)
        for log in train(trainer, pools, volumes, seed, config.influence.averaged if keep else 0.0):
            progress(f"loss {log.loss:.3f}", log.step, log.step + 1)
        trainer.model.eval()
        losses = losses_of(trainer.model, self.data, volumes, self.device, config.resources.batch_tokens, progress)
        if keep:
            trainer.save_model(keep / MODEL)
            trainer.save_damping(keep)
            if config.influence.averaged:
                trainer.save_average(keep / AVERAGE)
        return means(losses)

    def predict(
        self,
        checkpoint: Path,
        settings: InfluenceConfig,
        volumes: dict[str, int],
        seed: int,
        folder: Path,
        progress: Reporter,
    ) -> dict[str, Any]:
        """The influence table of one solver at a checkpoint, into ``folder``."""
        progress(settings.solver, 0, 1)
        where = for_influence(checkpoint) if settings.averaged else checkpoint / MODEL
        model = load_model(where, DTYPES[settings.precision], self.device)
        layers = tracked_layers(model, settings.layers)
        sample = Sampled(
            Sample(self.data, volumes, settings, seed).blocks(),
            len(volumes),
            settings,
            load_file(checkpoint / DAMPING),
            seed,
            self.config.resources.batch_tokens,
            self.device,
        )
        found = influence_tables(model, layers, sample, [settings.solver])[settings.solver]
        found.save(folder / TABLE)
        return {"layers": len(layers)}
