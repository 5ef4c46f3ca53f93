"""DoReMi's proxy run (``ideal.methods.doremi``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ideal.config.config import SftConfig
from service.stages.proxy import Here, ProxyResult, on_a_worker, pools
from service.stages.workers import Workers
from service.store.layout import MODEL
from service.store.stage import Record, Stage


@dataclass(frozen=True, kw_only=True)
class DoReMi(Stage[ProxyResult]):
    """Weights by how far a proxy's loss lies above a reference model's.

    Attributes:
        reference: the Joint SFT.
    """

    kind = "doremi"
    version = 3
    rate: float
    smoothing: float
    sft: SftConfig
    volumes: dict[str, int]
    seed: int
    base: Record[Any]
    data: Record[Any]
    reference: Record[Any]

    def run(self, folder: Path, on: Workers) -> ProxyResult:
        return on_a_worker(on, weights, self, folder, what=self.kind)


def weights(stage: DoReMi, folder: Path, here: Here) -> ProxyResult:
    """The proxy run in this process."""
    from ideal.methods import doremi
    from ideal.model.base import DTYPES, device, load_model

    compared = load_model(stage.reference.folder / MODEL, DTYPES[stage.sft.precision], device())
    total = sum(stage.volumes.values())
    trainer, examples = here.trainer(stage), pools(stage)
    found = doremi.weights(trainer, compared, examples, total, stage.seed, stage.rate, stage.smoothing)
    return here.watched(stage, found, folder)
