"""Influence on a cluster: layer blocks × data shards.

An actor owns one block of layers and one shard of the data. It passes over its shard once and writes, to the stage's
scratch folder, its part of the factors and each data block's gradient. Then the layers of a block are divided among
its actors by the cost of their eigen-decompositions; each is solved from all shards' files, and only the small table
of products leaves. More shards share the work of one pass; more layer blocks need less memory in each actor, but
each passes over the data.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from ideal.batches import length
from ideal.config import Config, InfluenceConfig
from ideal.curvature.accumulate import Block, BlockGradient, accumulate
from ideal.curvature.kfac import Eigen, curvature, eigenbasis
from ideal.curvature.layers import input_group, layer_shapes
from ideal.equilibrium import token_weights
from ideal.examples import ExampleSet
from ideal.influence import InfluenceTable, layer_products, shard, split
from ideal.mixture import draw
from ideal.model import DTYPES, device, load_model
from service.cluster import Cluster, Reservation
from service.data import MODEL, reference_file, train_file
from service.progress import Reporter
from service.stages import WORK

TABLE = "influence.safetensors"
Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Sample:
    """What an influence is computed from; small, so that every actor reads the examples for itself."""

    data: Path
    volumes: dict[str, int]
    config: InfluenceConfig
    seed: int

    def blocks(self) -> list[Block]:
        """Every domain's blocks, then every reference set's.

        A domain's sample is the beginning of its seeded order: what the mixture holds comes first.
        """
        pools = {domain: ExampleSet.load(train_file(self.data, domain)) for domain in self.volumes}
        lengths = [float(pool.supervised_tokens().mean()) for pool in pools.values()]
        weights = token_weights(list(self.volumes.values()), lengths)
        blocks: list[Block] = []
        for (domain, pool), weight in zip(pools.items(), weights, strict=True):
            sample = draw(len(pool), min(self.config.examples, len(pool)), self.seed, domain).tolist()
            blocks += split(f"train/{domain}", pool, sample, self.config.blocks, float(weight))
        for domain in self.volumes:
            reference = ExampleSet.load(reference_file(self.data, domain))
            everything = list(range(len(reference)))
            blocks += split(f"reference/{domain}", reference, everything, self.config.blocks, 0.0)
        return blocks


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
        layers, conditions, tokens, actors, pass_seconds, solve_seconds.

    Raises:
        BadInput: no layer matches, or no resources in time.
    """
    shapes = layer_shapes(AutoConfig.from_pretrained(checkpoint / MODEL), config.influence.layers)
    cuts = np.array_split(np.array(list(shapes)), min(layer_blocks, len(shapes)))
    groups = [[str(layer) for layer in cut] for cut in cuts]
    shards = max(1, cluster.influence_workers // len(groups))
    blocks = sample.blocks()
    parts = shard(blocks, shards)
    bundle = cluster.per_worker(1)
    with Reservation([bundle] * (len(groups) * shards), config.resources.wait_seconds, "influence") as reserved:
        make = InfluenceActor.options(  # type: ignore[attr-defined]
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_restarts=2,
            max_task_retries=2,
            scheduling_strategy=PlacementGroupSchedulingStrategy(reserved),
        )
        actors = [
            [
                make.remote(checkpoint / MODEL, sample, group, folder / WORK / f"layers-{number}", config)
                for _ in range(shards)
            ]
            for number, group in enumerate(groups)
        ]
        try:
            started = time.time()
            counted = ray.get(
                [
                    actor.accumulate.remote(s, part, progress if number == s == 0 else None)
                    for number, row in enumerate(actors)
                    for s, (actor, part) in enumerate(zip(row, parts, strict=True))
                ]
            )
            passed = time.time()
            solved = ray.get(
                [
                    actor.solve.remote(part, shards, progress if number == s == 0 else None)
                    for number, row in enumerate(actors)
                    for s, (actor, part) in enumerate(zip(row, by_cost(groups[number], shapes, shards), strict=True))
                ]
            )
        finally:
            for row in actors:
                for actor in row:
                    ray.kill(actor)
    tokens = {index: size for part in counted[:shards] for index, size in part.items()}
    layers = {layer: row for part in solved for layer, row in part.items()}
    _table(sample, tokens, {layer: layers[layer].products for layer in shapes}).save(folder / TABLE)
    return {
        "layers": list(shapes),
        "conditions": {layer: layers[layer].condition for layer in shapes},
        "tokens": sum(length(item) for block in blocks for item in block.items),
        "actors": len(groups) * shards,
        "pass_seconds": round(passed - started, 3),
        "solve_seconds": round(time.time() - passed, 3),
    }


@dataclass(frozen=True)
class Solved:
    """A layer's products [domain blocks, reference blocks], and its curvature's condition number before damping."""

    products: npt.NDArray[np.float64]
    condition: float


@ray.remote
class InfluenceActor:
    """One layer block on one data shard at a time; its methods can be repeated."""

    def __init__(self, model: Path, sample: Sample, layers: list[str], scratch: Path, config: Config) -> None:
        self.model, self.sample, self.layers, self.scratch, self.config = model, sample, layers, scratch, config
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.device = device()
        if self.device.type == "cpu":
            torch.set_num_threads(1)

    def accumulate(self, shard: int, members: list[int], progress: Reporter | None) -> dict[int, tuple[int, float]]:
        """Pass over the shard's blocks; factors and gradients go to files.

        Returns:
            (supervised tokens, summed loss) by block.
        """
        settings = self.config.influence
        model = load_model(self.model, DTYPES[settings.precision], self.device)
        everything = self.sample.blocks()
        blocks = [everything[index] for index in members]
        sizes: dict[int, tuple[int, float]] = {}

        def keep(block: Block, found: BlockGradient) -> None:
            index = members[len(sizes)]
            save_file({k: v.cpu() for k, v in found.gradients.items()}, self.scratch / f"block-{index}.safetensors")
            sizes[index] = (found.tokens, found.loss)
            if progress:
                progress(f"pass: {block.set}", len(sizes), len(members))

        sums = accumulate(
            model,
            self.layers,
            blocks,
            fisher=settings.fisher,
            factors=settings.solver == "kfac",
            seed=self.config.seed,
            batch_tokens=self.config.resources.batch_tokens,
            device=self.device,
            done=keep,
        )
        factors = {f"A/{name}": value.cpu() for name, value in sums.a.items()}
        factors |= {f"S/{name}": value.cpu() for name, value in sums.s.items()}
        save_file(
            {**factors, "positions": torch.tensor(sums.positions, dtype=torch.float64)},
            self.scratch / f"factors-{shard}.safetensors",
        )
        return sizes

    def solve(self, layers: list[str], shards: int, progress: Reporter | None) -> dict[str, Solved]:
        """Invert the curvature of some of the block's layers and take all products."""
        domains = len(self.sample.volumes) * self.config.influence.blocks
        bases: dict[str, Any] = {}
        solved = {}
        for number, layer in enumerate(layers):
            if progress:
                progress(f"solve: {layer}", number, len(layers))
            eigen = self._eigen(layer, shards, bases) if self.config.influence.solver == "kfac" else None
            products = layer_products(
                eigen,
                domains,
                domains,
                lambda side, block, layer=layer: self._read(  # type: ignore[misc]
                    f"block-{block + (domains if side == 'reference' else 0)}", layer
                ),
            )
            spread = eigen.condition if eigen else 1.0
            solved[layer] = Solved(products, spread)
        return solved

    def _eigen(self, layer: str, shards: int, bases: dict[str, Any]) -> Eigen:
        """The layer's damped curvature; layers that share an input share the decomposition of their A."""

        def total(name: str) -> torch.Tensor:
            return torch.stack([self._read(f"factors-{s}", name) for s in range(shards)]).sum(0)

        positions = float(total("positions"))
        group = input_group(layer)
        try:
            if group not in bases:
                bases.clear()
                bases[group] = eigenbasis(total(f"A/{group}") / positions)
            s = eigenbasis(total(f"S/{layer}") / positions)
            return curvature(bases[group], s, positions, self.config.influence.damping, torch.float32)
        except FloatingPointError as error:
            raise FloatingPointError(f"influence: layer {layer} {error}") from None

    def _read(self, file: str, name: str) -> torch.Tensor:
        return read_tensor(self.scratch / f"{file}.safetensors", name, self.device)


def read_tensor(path: Path, name: str, where: torch.device) -> torch.Tensor:
    """One tensor of a safetensors file; the others stay on disk."""
    with safe_open(path, framework="pt", device=str(where)) as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor


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


def _table(
    sample: Sample, sizes: dict[int, tuple[int, float]], products: dict[str, npt.NDArray[np.float64]]
) -> InfluenceTable:
    m, b = len(sample.volumes), sample.config.blocks
    tokens = np.array([sizes[i][0] for i in range(2 * m * b)], float).reshape(2, m, b)
    losses = np.array([sizes[i][1] for i in range(2 * m * b)]).reshape(2, m, b)
    return InfluenceTable(
        np.stack([rows.reshape(m, b, m, b) for rows in products.values()]),
        tokens[0],
        tokens[1],
        losses[1].sum(1) / tokens[1].sum(1),
    )
