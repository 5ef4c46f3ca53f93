"""DOGE's proxy run (``ideal.methods.doge``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ideal.config.config import SftConfig
from service.stages.proxy import Here, ProxyResult, on_a_worker, pools, references
from service.stages.workers import Workers
from service.store.stage import Record, Stage


@dataclass(frozen=True, kw_only=True)
class Doge(Stage[ProxyResult]):
    """Weights by how well each domain's gradient agrees with the reference sets'.

    Attributes:
        wanted: each reference set's weight in what is minimised.
    """

    kind = "doge"
    version = 3
    drive: float
    wanted: list[float]
    sft: SftConfig
    volumes: dict[str, int]
    seed: int
    base: Record[Any]
    data: Record[Any]

    def run(self, folder: Path, on: Workers) -> ProxyResult:
        return on_a_worker(on, weights, self, folder, what=self.kind)


def weights(stage: Doge, folder: Path, here: Here) -> ProxyResult:
    """The proxy run in this process."""
    from ideal.methods import doge

    total, wanted = sum(stage.volumes.values()), np.array(stage.wanted)
    trainer = here.trainer(stage)
    found = doge.weights(trainer, pools(stage), references(stage), wanted, total, stage.seed, stage.drive)
    return here.watched(stage, found, folder)
