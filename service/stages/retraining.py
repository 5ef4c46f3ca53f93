"""Short trainings, many at once: each by one task, its losses kept and its weights only where they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ideal.config.config import ResourcesConfig, SftConfig
from ideal.costs import PASSES, TRAINING
from ideal.data.examples import ExampleSet
from service.cluster.progress import Reporter
from service.stages.reference import losses_of, means
from service.stages.workers import Workers
from service.store.layout import MODEL, train_file
from service.store.stage import Record, Stage

TRAINED = "the training"
"""In a training's result beside its reference sets, none of which can be called so."""


@dataclass(frozen=True, kw_only=True)
class Retraining(Stage[dict[str, Any]]):
    """SFT of θ₀ on a mixture in one process, and its reference losses.

    Its result is each reference set's loss (nats per token), tokens and passes; the training's under ``TRAINED``.

    Attributes:
        averaged: share of the steps whose weights' mean is left beside the model.
        keep: the trained model, too, as an SFT leaves it.
    """

    kind = "retraining"
    version = 3
    sft: SftConfig
    averaged: float
    volumes: dict[str, int]
    seed: int
    keep: bool
    base: Record[Any]
    data: Record[Any]

    def run(self, folder: Path, on: Workers) -> dict[str, Any]:
        keep = folder if self.keep else None
        return on.one(train_here, self, keep, on.resources, on.progress, what="retrainings", cpus=1)


def losses_after(record: Record[Mapping[str, Any]]) -> dict[str, float]:
    """Each reference set's loss (nats per token) after a training."""
    return {name: row["loss"] for name, row in record.result.items() if name != TRAINED}


def train_here(stage: Retraining, keep: Path | None, resources: ResourcesConfig, progress: Reporter) -> dict[str, Any]:
    """A retraining in this process.

    Args:
        keep: where the trained model goes; None leaves nothing but the losses.
    """
    import torch

    from ideal.model.base import device
    from ideal.training.trainer import AVERAGE, Trainer, train

    where, batch_tokens = device(), resources.batch_tokens
    if where.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(stage.seed)
    pools = {domain: ExampleSet.load(train_file(stage.data.folder, domain)) for domain in stage.volumes}
    trainer = Trainer(stage.base.folder / MODEL, stage.sft, where, batch_tokens)
    tokens = 0
    for log in train(trainer, pools, stage.volumes, stage.seed, stage.averaged if keep else 0.0):
        tokens += log.tokens
        progress(f"loss {log.loss:.3f}", log.step, log.step + 1)
    trainer.model.eval()
    losses = losses_of(trainer.model, stage.data.folder, stage.volumes, where, batch_tokens, progress)
    if keep:
        trainer.save_model(keep / MODEL)
        trainer.save_damping(keep)
        if stage.averaged:
            trainer.save_average(keep / AVERAGE)
    return {**means(losses, stage.data.folder), TRAINED: {"tokens": tokens, PASSES: TRAINING * tokens}}
