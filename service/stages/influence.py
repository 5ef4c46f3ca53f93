"""Influence on a cluster: layer blocks × data shards.

An actor owns one block of layers and one shard of the data. It passes over its shard once and writes, to the stage's
scratch folder, its part of the factors and each data block's gradient. Then the layers of a block are divided among
its actors by the cost of their eigen-decompositions; each is solved from all shards' files, and only the small table
of products leaves. More shards share the work of one pass; more layer blocks need less memory in each actor, but
each passes over the data. `ekfac` passes a second time, in the eigenbases. With `joint`,
forward passes of all layers over a few examples follow, which all actors share.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ideal.config.config import InfluenceConfig, LoraConfig
from ideal.costs import PASSES, input_tokens, of_influence
from ideal.influence.table import shard
from service.cluster.cluster import Reservation
from service.stages.workers import Workers
from service.store.layout import MODEL, TABLE, for_influence
from service.store.stage import Identified, Record, Stage
from service.store.store import WORK


class InfluenceResult(TypedDict):
    """What was computed, and how well its systems could be solved.

    Attributes:
        layers: the tracked ones.
        conditions: of each layer's curvature, with its damping.
        repaired: the ridge that each singular layer needed.
        tokens: of the sample.
    """

    layers: list[str]
    conditions: dict[str, float]
    repaired: dict[str, float]
    tokens: int
    passes: int
    actors: int
    pass_seconds: float
    solve_seconds: float


@dataclass(frozen=True, kw_only=True)
class Influence(Stage[InfluenceResult]):
    """Influence of every domain on every reference set at a checkpoint: the table in ``influence.safetensors``.

    Attributes:
        lora: the checkpoint's adapters.
        volumes: of the mixture that was trained on.
        model: an SFT's record.
    """

    kind = "influence"
    version = 5
    influence: Identified[InfluenceConfig]
    lora: LoraConfig | None
    volumes: dict[str, int]
    seed: int
    model: Record[Any]
    data: Record[Any]

    def run(self, folder: Path, on: Workers) -> InfluenceResult:
        """As ``Stage.run``.

        Raises:
            BadInput: no layer matches, or no resources in time.
        """
        from transformers import AutoConfig

        from ideal.influence.layers import layer_shapes
        from ideal.influence.products import combined, table_of
        from ideal.influence.sampled import curvature_blocks, tokens_and_weights
        from ideal.model.lora import base_of
        from service.planning.partition import by_cost, cut
        from service.stages.influence_actor import InfluenceActor
        from service.stages.sample import Sample

        settings, cluster, progress = self.influence.value, on.cluster, on.progress
        sample = Sample(self.data.folder, self.volumes, settings, self.seed)
        model = for_influence(self.model.folder)
        shapes = layer_shapes(AutoConfig.from_pretrained(base_of(model)), settings.layers, self.lora)
        groups = [list(part) for part in cut(shapes, on.layer_blocks(self.model.folder / MODEL))]
        shards = max(1, cluster.influence_workers // len(groups))
        blocks = sample.blocks()
        parts = shard(blocks, shards)
        bundle = cluster.per_worker(1)
        with Reservation([bundle] * (len(groups) * shards), on.resources.wait_seconds, "influence") as reserved:
            make = InfluenceActor.options(  # type: ignore[attr-defined]
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_restarts=2,
                max_task_retries=-1,  # a lost node costs several at once; `max_restarts` is the limit
                scheduling_strategy=PlacementGroupSchedulingStrategy(reserved),
            )
            actors = [
                [
                    make.remote(model, sample, group, folder / WORK / f"layers-{number}", on.resources.batch_tokens)
                    for _ in range(shards)
                ]
                for number, group in enumerate(groups)
            ]
            try:
                started = time.monotonic()
                counted = _everywhere(
                    actors,
                    lambda actor, n, s: actor.accumulate.remote(s, parts[s], progress if n == s == 0 else None),
                )
                passed = time.monotonic()
                costs = [by_cost(group, shapes, shards) for group in groups]
                if settings.solver == "ekfac":
                    _everywhere(actors, lambda actor, n, s: actor.decompose.remote(costs[n][s], shards))
                    _everywhere(actors, lambda actor, n, s: actor.refine.remote(s, parts[s]))
                solved = _everywhere(
                    actors,
                    lambda actor, n, s: actor.solve.remote(costs[n][s], shards, progress if n == s == 0 else None),
                )
                if settings.joint:
                    count = len(groups) * shards
                    curved = shard(curvature_blocks(blocks, len(sample.volumes), settings, count), count)
                    forms = _everywhere(
                        actors,
                        lambda actor, n, s: actor.forms.remote(list(shapes), curved[n * shards + s], count),
                    )
            finally:
                for row in actors:
                    for actor in row:
                        ray.kill(actor)
        tokens = {index: size for part in counted[:shards] for index, size in part.items()}
        layers = {layer: row for part in solved for layer, row in part.items()}
        products = {layer: layers[layer].products for layer in shapes}
        if settings.joint:
            damping = [part for layer in shapes if (part := layers[layer].damping) is not None]
            products = combined(products, np.sum(forms, 0), damping, settings.blocks)
        sizes = [tokens[index] for index in range(len(blocks))]
        _, weights = tokens_and_weights(blocks, len(sample.volumes), settings.blocks)
        table_of(list(products.values()), sizes, weights, settings.blocks).save(folder / TABLE)
        return {
            "layers": list(shapes),
            "conditions": {layer: layers[layer].condition for layer in shapes},
            "repaired": {layer: layers[layer].ridge for layer in shapes if layers[layer].ridge},
            "tokens": input_tokens(item for block in blocks for item in block.items),
            PASSES: of_influence(blocks, len(sample.volumes), settings),
            "actors": len(groups) * shards,
            "pass_seconds": round(passed - started, 3),
            "solve_seconds": round(time.monotonic() - passed, 3),
        }


def _everywhere(actors: list[list[Any]], call: Callable[[Any, int, int], Any]) -> list[Any]:
    """The results of one call to every actor, given its layer block and its shard."""
    return ray.get([call(actor, n, s) for n, row in enumerate(actors) for s, actor in enumerate(row)])
