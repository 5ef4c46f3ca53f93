"""Influence on a cluster: layer blocks × data shards.

An actor owns one block of layers and one shard of the data. It passes over its shard once and writes, to the stage's
scratch folder, its part of the factors and each data block's gradient. Then the layers of a block are divided among
its actors by the cost of their eigen-decompositions; each is solved from all shards' files, and only the small table
of products leaves. More shards share the work of one pass; more layer blocks need less memory in each actor, but
each passes over the data. `ekfac` passes a second time, in the eigenbases. With `joint` forward passes of all layers
over a few examples follow, which all actors share.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from transformers import AutoConfig

from ideal.config import Config
from ideal.costs import PASSES, input_tokens, of_influence
from ideal.curvature.layers import input_group, layer_shapes
from ideal.influence import shard
from ideal.lora import base_of
from ideal.products import combined, table_of
from ideal.sampled import curvature_blocks, tokens_and_weights
from service.cluster import Cluster, Reservation
from service.files import TABLE, for_influence
from service.influence_actor import InfluenceActor
from service.memory import cut
from service.progress import Reporter
from service.sample import Sample
from service.stages import WORK

Shapes = dict[str, tuple[int, int]]


def influence(
    folder: Path,
    *,
    checkpoint: Path,
    sample: Sample,
    config: Config,
    cluster: Cluster,
    layer_blocks: int,
    progress: Reporter,
) -> dict[str, Any]:
    """Influence of every domain on every reference set at a checkpoint; the table goes to ``folder``.

    Args:
        checkpoint: the SFT's stage folder.
        layer_blocks: parts the tracked layers are cut in.

    Returns:
        layers, conditions, tokens, passes, actors, pass_seconds, solve_seconds.

    Raises:
        BadInput: no layer matches, or no resources in time.
    """
    model = for_influence(checkpoint)
    shapes = layer_shapes(AutoConfig.from_pretrained(base_of(model)), config.influence.layers, config.sft.lora)
    groups = [list(part) for part in cut(shapes, layer_blocks)]
    shards = max(1, cluster.influence_workers // len(groups))
    blocks = sample.blocks()
    parts = shard(blocks, shards)
    bundle = cluster.per_worker(1)
    with Reservation([bundle] * (len(groups) * shards), config.resources.wait_seconds, "influence") as reserved:
        make = InfluenceActor.options(  # type: ignore[attr-defined]
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_restarts=2,
            max_task_retries=-1,  # a lost node costs several at once; `max_restarts` is the limit
            scheduling_strategy=PlacementGroupSchedulingStrategy(reserved),
        )
        actors = [
            [make.remote(model, sample, group, folder / WORK / f"layers-{number}", config) for _ in range(shards)]
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
            if config.influence.solver == "ekfac":
                _everywhere(actors, lambda actor, n, s: actor.decompose.remote(costs[n][s], shards))
                _everywhere(actors, lambda actor, n, s: actor.refine.remote(s, parts[s]))
            solved = _everywhere(
                actors,
                lambda actor, n, s: actor.solve.remote(costs[n][s], shards, progress if n == s == 0 else None),
            )
            if config.influence.joint:
                count = len(groups) * shards
                curved = shard(curvature_blocks(blocks, len(sample.volumes), config.influence, count), count)
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
    if config.influence.joint:
        damping = [part for layer in shapes if (part := layers[layer].damping) is not None]
        products = combined(products, np.sum(forms, 0), damping, config.influence.blocks)
    sizes = [tokens[index] for index in range(len(blocks))]
    _, weights = tokens_and_weights(blocks, len(sample.volumes), config.influence.blocks)
    table_of(list(products.values()), sizes, weights, config.influence.blocks).save(folder / TABLE)
    return {
        "layers": list(shapes),
        "conditions": {layer: layers[layer].condition for layer in shapes},
        "repaired": {layer: layers[layer].ridge for layer in shapes if layers[layer].ridge},
        "tokens": input_tokens(item for block in blocks for item in block.items),
        PASSES: of_influence(blocks, len(sample.volumes), config.influence),
        "actors": len(groups) * shards,
        "pass_seconds": round(passed - started, 3),
        "solve_seconds": round(time.monotonic() - passed, 3),
    }


def _everywhere(actors: list[list[Any]], call: Callable[[Any, int, int], Any]) -> list[Any]:
    """The results of one call to every actor, given its layer block and its shard."""
    return ray.get([call(actor, n, s) for n, row in enumerate(actors) for s, actor in enumerate(row)])


def by_cost(layers: list[str], shapes: Shapes, workers: int) -> list[list[str]]:
    """Layers for each worker, nearly equal in d³; layers that share an input stay together."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(input_group(layer), []).append(layer)
    cost = {g: sum(shapes[x][0] ** 3 for x in xs) + shapes[xs[0]][1] ** 3 for g, xs in groups.items()}
    parts: list[list[str]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for group in sorted(groups, key=lambda g: -cost[g]):
        lightest = loads.index(min(loads))
        parts[lightest] += groups[group]
        loads[lightest] += cost[group]
    return parts
