"""One solver's influence table at a trained model, in one process: what the fidelity study compares with retraining."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from ideal.config.config import InfluenceConfig
from service.cluster.progress import Reporter
from service.stages.workers import Workers
from service.store.layout import MODEL, TABLE, for_influence
from service.store.stage import Identified, Record, Stage


class PredictionResult(TypedDict):
    layers: int


@dataclass(frozen=True, kw_only=True)
class Prediction(Stage[PredictionResult]):
    """The influence table of one solver, in ``influence.safetensors``.

    Attributes:
        volumes: of the mixture that was trained on.
        trained: a retraining that kept its model.
    """

    kind = "prediction"
    version = 4
    influence: Identified[InfluenceConfig]
    volumes: dict[str, int]
    seed: int
    trained: Record[Any]
    data: Record[Any]

    def run(self, folder: Path, on: Workers) -> PredictionResult:
        tokens = on.resources.batch_tokens
        return on.one(_predict, self, folder, tokens, on.progress, what="predictions", cpus=1)


def _predict(stage: Prediction, folder: Path, batch_tokens: int, progress: Reporter) -> PredictionResult:
    import torch
    from safetensors.torch import load_file

    from ideal.influence.in_process import influence_tables
    from ideal.influence.layers import tracked_layers
    from ideal.influence.sampled import Sampled
    from ideal.model.base import DTYPES, device, load_model
    from ideal.training.trainer import DAMPING
    from service.stages.sample import Sample

    settings, checkpoint, where = stage.influence.value, stage.trained.folder, device()
    if where.type == "cpu":
        torch.set_num_threads(1)
    progress(settings.solver, 0, 1)
    at = for_influence(checkpoint) if settings.averaged else checkpoint / MODEL
    model = load_model(at, DTYPES[settings.precision], where)
    layers = tracked_layers(model, settings.layers)
    sample = Sampled(
        Sample(stage.data.folder, stage.volumes, settings, stage.seed).blocks(),
        len(stage.volumes),
        settings,
        load_file(checkpoint / DAMPING),
        stage.seed,
        batch_tokens,
        where,
    )
    found = influence_tables(model, layers, sample, [settings.solver])[settings.solver]
    found.save(folder / TABLE)
    return {"layers": len(layers)}
