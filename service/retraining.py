"""Many small trainings at once: each in one process, its losses kept and its weights only where they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from safetensors.torch import load_file

from ideal.config import Config, InfluenceConfig
from ideal.costs import PASSES, TRAINING
from ideal.curvature.layers import tracked_layers
from ideal.examples import ExampleSet
from ideal.in_process import influence_tables
from ideal.model import DTYPES, device, load_model
from ideal.sampled import Sampled
from ideal.training import AVERAGE, DAMPING, Trainer, train
from service.cluster import Cluster, Reservation
from service.files import MODEL, TABLE, for_influence, train_file
from service.progress import Reporter
from service.reference import losses_of, means
from service.sample import Sample
from service.stages import Record, Stage

TRAINED = "the training"
"""In a training's result beside its reference sets, none of which can be called so."""
Piece = Callable[[Any], Record]
"""Work that a retrainer is handed to."""


def training_stage(
    config: Config, seed: int, volumes: dict[str, int], base: Record, data: Record, keep: bool = False
) -> Stage:
    """SFT on a mixture and its reference losses.

    Args:
        keep: the trained model, too.
    """
    settings = {"sft": config.sft.of_the_weights(), "seed": seed, "volumes": volumes, "keep": keep}
    if keep:
        settings["averaged"] = config.influence.averaged
    return Stage("retraining", settings, {"model": base.fingerprint, "data": data.fingerprint})


def training(actor: Any, volumes: dict[str, int], seed: int, keep: bool) -> Callable[[Path, Reporter], dict[str, Any]]:
    """A training stage's work, by one retrainer."""

    def work(folder: Path, progress: Reporter) -> dict[str, Any]:
        found: dict[str, Any] = ray.get(actor.retrain.remote(volumes, seed, folder if keep else None, progress))
        return found

    return work


def losses_after(record: Record) -> dict[str, float]:
    """Each reference set's loss (nats per token) after a training."""
    return {name: row["loss"] for name, row in record.result.items() if name != TRAINED}


@contextmanager
def retrainers(config: Config, cluster: Cluster, base: Path, data: Path) -> Iterator[Callable[[Piece], Future[Record]]]:
    """Actors that each take one piece of work at a time; yields how to hand them some.

    Args:
        base, data: stage folders.

    Raises:
        BadInput: no resources in time.
    """
    count = cluster.influence_workers
    bundle = cluster.per_worker(1)
    with Reservation([bundle] * count, config.resources.wait_seconds, "retrainings") as reserved:
        make = Retrainer.options(  # type: ignore[attr-defined]
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_restarts=10,
            max_task_retries=-1,  # a lost node costs several at once; `max_restarts` is the limit
            scheduling_strategy=PlacementGroupSchedulingStrategy(reserved),
        )
        free: Queue[Any] = Queue()
        for _ in range(count):
            free.put(make.remote(base / MODEL, data, config))

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
            each reference set's loss (nats per token), tokens and passes; the training's under ``TRAINED``.
        """
        torch.manual_seed(seed)
        config = self.config
        pools = {domain: ExampleSet.load(train_file(self.data, domain)) for domain in volumes}
        trainer = Trainer(self.base, config.sft, self.device, config.resources.batch_tokens)
        tokens = 0
        for log in train(trainer, pools, volumes, seed, config.influence.averaged if keep else 0.0):
            tokens += log.tokens
            progress(f"loss {log.loss:.3f}", log.step, log.step + 1)
        trainer.model.eval()
        losses = losses_of(trainer.model, self.data, volumes, self.device, config.resources.batch_tokens, progress)
        if keep:
            trainer.save_model(keep / MODEL)
            trainer.save_damping(keep)
            if config.influence.averaged:
                trainer.save_average(keep / AVERAGE)
        return {**means(losses, self.data), TRAINED: {"tokens": tokens, PASSES: TRAINING * tokens}}

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
