"""Influence on a cluster: layer blocks × data shards.

An actor owns one block of layers and one shard of the data. It passes over its shard once and writes, to the stage's
scratch folder, its part of the factors and each data block's gradient. Then the layers of a block are divided among
its actors by the cost of their eigen-decompositions; each is solved from all shards' files, and only the small table
of products leaves. More shards share the work of one pass; more layer blocks need less memory in each actor, but
each passes over the data. `ekfac` passes a second time, in the eigenbases; `exact` knows no layer blocks: its first
actor runs the conjugate gradients, and all shards compute each curvature product together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from ideal.batches import length
from ideal.config import Config, InfluenceConfig
from ideal.curvature.accumulate import Block, BlockGradient, FactorSums, accumulate
from ideal.curvature.ekfac import squared_gradients
from ideal.curvature.exact import GaussNewton, Vectors, conjugate_gradients
from ideal.curvature.kfac import Eigen, Eigenbasis, eigenbasis
from ideal.curvature.layers import input_group, layer_shapes
from ideal.equilibrium import token_weights
from ideal.examples import ExampleSet
from ideal.influence import Array, shard, split
from ideal.mixture import draw
from ideal.model import DTYPES, device, load_model
from ideal.solvers import (
    FACTORED,
    Diagonal,
    Metric,
    Plain,
    curvature_blocks,
    exact_damping,
    exact_products,
    layer_curvature,
    layer_products,
    needs_factors,
    set_sums,
    table_of,
)
from ideal.training import DAMPING
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
            if config.influence.solver == "exact":
                curved = shard(curvature_blocks(blocks, len(sample.volumes), config.influence), shards)
                solved = [ray.get(actors[0][0].exact.remote(shards, curved, actors[0][1:], progress))]
            else:
                costs = [by_cost(group, shapes, shards) for group in groups]
                if config.influence.solver == "ekfac":
                    _everywhere(actors, lambda actor, n, s: actor.decompose.remote(costs[n][s], shards))
                    _everywhere(actors, lambda actor, n, s: actor.refine.remote(s, parts[s]))
                solved = _everywhere(
                    actors,
                    lambda actor, n, s: actor.solve.remote(costs[n][s], shards, progress if n == s == 0 else None),
                )
        finally:
            for row in actors:
                for actor in row:
                    ray.kill(actor)
    tokens = {index: size for part in counted[:shards] for index, size in part.items()}
    layers = {layer: row for part in solved for layer, row in part.items()}
    table_of(
        [layers[layer].products for layer in shapes],
        [tokens[index] for index in range(len(blocks))],
        len(sample.volumes),
        config.influence.blocks,
    ).save(folder / TABLE)
    return {
        "layers": list(shapes),
        "conditions": {layer: layers[layer].condition for layer in shapes},
        "repaired": {layer: layers[layer].ridge for layer in shapes if layers[layer].ridge},
        "residual": max(part.residual for part in layers.values()),
        "tokens": sum(length(item) for block in blocks for item in block.items),
        "actors": len(groups) * shards,
        "pass_seconds": round(passed - started, 3),
        "solve_seconds": round(time.time() - passed, 3),
    }


@dataclass(frozen=True)
class Solved:
    """A layer's products, and how well its system was behaved.

    Attributes:
        products: [domain blocks, reference blocks].
        condition: of its curvature, before damping; 1 for solvers without.
        ridge: what a factor needed on its diagonal to be decomposed, as a multiple of its mean eigenvalue.
        residual: of `exact`, relative, the largest of all sets; 0 for the others.
    """

    products: Array
    condition: float = 1.0
    ridge: float = 0.0
    residual: float = 0.0


def _everywhere(actors: list[list[Any]], call: Callable[[Any, int, int], Any]) -> list[Any]:
    """The results of one call to every actor, given its layer block and its shard."""
    return ray.get([call(actor, n, s) for n, row in enumerate(actors) for s, actor in enumerate(row)])


@ray.remote
class InfluenceActor:
    """One layer block on one data shard at a time; its methods can be repeated."""

    def __init__(self, model: Path, sample: Sample, layers: list[str], scratch: Path, config: Config) -> None:
        self.model, self.sample, self.layers, self.scratch, self.config = model, sample, layers, scratch, config
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.system: GaussNewton | None = None
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
            save_file({k: v.cpu() for k, v in found.gradients.items()}, self._file(f"block-{index}"))
            sizes[index] = (found.tokens, found.loss)
            if progress:
                progress(f"pass: {block.set}", len(sizes), len(members))

        sums = accumulate(
            model,
            self.layers,
            blocks,
            fisher=settings.fisher,
            factors=needs_factors(settings.solver, settings),
            seed=self.config.seed,
            batch_tokens=self.config.resources.batch_tokens,
            device=self.device,
            done=keep,
        )
        factors = {f"A/{name}": value.cpu() for name, value in sums.a.items()}
        factors |= {f"S/{name}": value.cpu() for name, value in sums.s.items()}
        save_file(
            {**factors, "positions": torch.tensor(sums.positions, dtype=torch.float64)},
            self._file(f"factors-{shard}"),
        )
        return sizes

    def decompose(self, layers: list[str], shards: int) -> None:
        """Write the eigenbases of some of the block's layers, for the second pass."""
        found: dict[str, Eigenbasis] = {}
        for layer in layers:
            a, s = self._bases(layer, shards, found)
            tensors = {"A": a.vectors, "S": s.vectors, "a": a.values, "s": s.values}
            ridges = {"ridges": torch.tensor([a.ridge, s.ridge], dtype=torch.float64)}
            save_file({k: v.cpu().contiguous() for k, v in (tensors | ridges).items()}, self._file(f"basis-{layer}"))

    def refine(self, shard: int, members: list[int]) -> None:
        """Pass over the shard's blocks again, in the eigenbases of all of the block's layers (`ekfac`)."""
        everything = self.sample.blocks()
        bases = {layer: self._recorded(layer) for layer in self.layers}
        squares = squared_gradients(
            load_model(self.model, DTYPES[self.config.influence.precision], self.device),
            {layer: (s.vectors.float(), a.vectors.float()) for layer, (a, s) in bases.items()},
            [everything[index] for index in members],
            fisher=self.config.influence.fisher,
            seed=self.config.seed,
            batch_tokens=self.config.resources.batch_tokens,
            device=self.device,
        )
        save_file({layer: value.cpu() for layer, value in squares.items()}, self._file(f"squares-{shard}"))

    def solve(self, layers: list[str], shards: int, progress: Reporter | None) -> dict[str, Solved]:
        """Invert the curvature of some of the block's layers and take all products."""
        domains = len(self.sample.volumes) * self.config.influence.blocks
        bases: dict[str, Eigenbasis] = {}
        solved = {}
        for number, layer in enumerate(layers):
            if progress:
                progress(f"solve: {layer}", number, len(layers))
            metric = self._metric(layer, shards, bases)
            products = layer_products(
                metric,
                domains,
                domains,
                lambda side, block, layer=layer: self._read(  # type: ignore[misc]
                    f"block-{block + (domains if side == 'reference' else 0)}", layer
                ),
            )
            if isinstance(metric, Eigen):
                solved[layer] = Solved(products, metric.condition, metric.ridge)
            else:
                solved[layer] = Solved(products)
        return solved

    def exact(
        self, shards: int, curved: list[list[int]], others: list[Any], progress: Reporter | None
    ) -> dict[str, Solved]:
        """Solve the system of all layers together and take all products.

        Args:
            curved: curvature blocks of each shard; this actor's first.
            others: the other shards' actors.
        """
        settings = self.config.influence
        sets = 2 * len(self.sample.volumes)
        gradients = {
            layer: torch.stack([self._read(f"block-{i}", layer) for i in range(sets * settings.blocks)])
            for layer in self.layers
        }
        done = 0

        def product(vectors: Vectors) -> Vectors:
            nonlocal done
            if progress:
                progress("conjugate gradients", done, settings.products)
            done += 1
            sent = ray.put({layer: v.cpu() for layer, v in vectors.items()})
            theirs = [actor.product.remote(sent, part) for actor, part in zip(others, curved[1:], strict=True)]
            total = self.product(vectors, curved[0])
            for part in ray.get(theirs):
                total = {layer: v + part[layer].to(v.device) for layer, v in total.items()}
            return total

        solution = conjugate_gradients(
            product,
            {layer: set_sums(g, settings.blocks) for layer, g in gradients.items()},
            exact_damping(self._sums(shards), self.layers, settings, self._own()),
            tolerance=settings.residual,
            limit=settings.products,
        )
        tokens = np.array([float(block.supervised()) for block in self.sample.blocks()]).reshape(sets, settings.blocks)
        return {
            layer: Solved(
                exact_products(solution.vectors[layer], gradients[layer], tokens, len(self.sample.volumes)),
                residual=max(solution.residuals),
            )
            for layer in self.layers
        }

    def product(self, vectors: Vectors, members: list[int]) -> Vectors:
        """The curvature's product with some vectors, over some of the curvature blocks."""
        if not members:
            return {layer: torch.zeros_like(v) for layer, v in vectors.items()}
        if self.system is None:
            chosen = curvature_blocks(self.sample.blocks(), len(self.sample.volumes), self.config.influence)
            model = load_model(self.model, DTYPES[self.config.influence.precision], self.device)
            blocks = [chosen[index] for index in members]
            self.system = GaussNewton(model, self.layers, blocks, self.config.resources.batch_tokens, self.device)
        return self.system.product({layer: v.to(self.device) for layer, v in vectors.items()})

    def _metric(self, layer: str, shards: int, bases: dict[str, Eigenbasis]) -> Metric:
        settings = self.config.influence
        if settings.solver == "adam":
            return Diagonal(self._own()[layer])
        if settings.solver not in FACTORED:
            return Plain()
        refine = settings.solver == "ekfac"
        a, s = self._recorded(layer) if refine else self._bases(layer, shards, bases)
        return layer_curvature(
            layer,
            a,
            s,
            float(self._total("factors", "positions", shards)),
            settings,
            self._own()[layer] if settings.damping == "schedule" else None,
            self._total("squares", layer, shards) if refine else None,
            torch.float32,
        )

    def _bases(self, layer: str, shards: int, bases: dict[str, Eigenbasis]) -> tuple[Eigenbasis, Eigenbasis]:
        """(of A, of S); layers that share an input share the decomposition of their A."""
        positions = self._total("factors", "positions", shards)
        group = input_group(layer)
        try:
            if group not in bases:
                bases.clear()
                bases[group] = eigenbasis(self._total("factors", f"A/{group}", shards) / positions)
            return bases[group], eigenbasis(self._total("factors", f"S/{layer}", shards) / positions)
        except FloatingPointError as error:
            raise FloatingPointError(f"influence: layer {layer} {error}") from None

    def _recorded(self, layer: str) -> tuple[Eigenbasis, Eigenbasis]:
        ridges = self._read(f"basis-{layer}", "ridges").tolist()
        a, s = (
            Eigenbasis(self._read(f"basis-{layer}", name.lower()), self._read(f"basis-{layer}", name), ridge)
            for name, ridge in zip("AS", ridges, strict=True)
        )
        return a, s

    def _own(self) -> dict[str, torch.Tensor]:
        """Λ of the block's layers as the SFT left it."""
        path = self.model.parent / DAMPING
        return {layer: read_tensor(path, f"{layer}.weight", self.device).float() for layer in self.layers}

    def _sums(self, shards: int) -> FactorSums:
        """The whole sample's factors; empty where none were asked for."""
        sums = FactorSums()
        if needs_factors("exact", self.config.influence):
            sums.positions = float(self._total("factors", "positions", shards))
            for layer in self.layers:
                sums.a[input_group(layer)] = self._total("factors", f"A/{input_group(layer)}", shards)
                sums.s[layer] = self._total("factors", f"S/{layer}", shards)
        return sums

    def _total(self, kind: str, name: str, shards: int) -> torch.Tensor:
        """The sum of a tensor over all shards' files."""
        return torch.stack([self._read(f"{kind}-{s}", name) for s in range(shards)]).sum(0)

    def _file(self, name: str) -> Path:
        return self.scratch / f"{name}.safetensors"

    def _read(self, file: str, name: str) -> torch.Tensor:
        return read_tensor(self._file(file), name, self.device)


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
