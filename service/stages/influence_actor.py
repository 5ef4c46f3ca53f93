"""The worker of the influence stage: one layer block on one data shard, through files in the stage's scratch folder.

| file | what it holds |
| --- | --- |
| `block-i` | a data block's gradient by layer |
| `factors-s` | a shard's part of A and S |
| `basis-layer` | its eigenvectors and eigenvalues, for the second pass (`ekfac`) |
| `squares-s` | a shard's part of the refined eigenvalues |
| `solutions-layer` | the sets' solutions, for all layer blocks (`joint`) |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import ray
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ideal.influence.accumulate import Block, BlockGradient, FactorSums, accumulate
from ideal.influence.ekfac import squared_gradients
from ideal.influence.joint import damping_forms, quadratic_forms
from ideal.influence.kfac import Divided, Eigen, Eigenbasis, Inverse
from ideal.influence.layers import input_group
from ideal.influence.products import crowded_means, set_sums, with_sets
from ideal.influence.sampled import curvature_blocks, tokens_and_weights
from ideal.influence.solvers import (
    FACTORED,
    Diagonal,
    LayerSolver,
    Plain,
    layer_bases,
    layer_curvature,
    layer_inverse,
    needs_factors,
    solutions,
)
from ideal.influence.table import Array
from ideal.model.base import DTYPES, device, load_model
from ideal.training.trainer import DAMPING
from service.cluster.progress import Reporter
from service.stages.sample import Sample


@dataclass(frozen=True)
class Solved:
    """A layer's products, and how well its system was behaved.

    Attributes:
        products: [blocks + M, sets] ⟨x_s, g_b⟩, and below them ``crowded_means``'.
        condition: of its curvature, before damping; 1 for solvers without.
        ridge: what a factor needed on its diagonal to be decomposed, as a multiple of its mean eigenvalue.
        damping: [sets, sets] the layer's part of UᵀΛU, for `joint`.
    """

    products: Array
    condition: float = 1.0
    ridge: float = 0.0
    damping: Array | None = None


@ray.remote
class InfluenceActor:
    """One layer block on one data shard at a time; its methods can be repeated."""

    def __init__(self, model: Path, sample: Sample, layers: list[str], scratch: Path, batch_tokens: int) -> None:
        self.model, self.sample, self.layers, self.scratch = model, sample, layers, scratch
        self.batch_tokens = batch_tokens
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.counts: tuple[Array, list[float]] | None = None
        self.device = device()
        if self.device.type == "cpu":
            torch.set_num_threads(1)

    def accumulate(self, shard: int, members: list[int], progress: Reporter | None) -> dict[int, tuple[int, float]]:
        """Pass over the shard's blocks; factors and gradients go to files.

        Returns:
            (supervised tokens, summed loss) by block.
        """
        settings = self.sample.config
        model = load_model(self.model, DTYPES[settings.precision], self.device)
        sampled = self.sample.blocks()
        blocks = [sampled[index] for index in members]
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
            seed=self.sample.seed,
            batch_tokens=self.batch_tokens,
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
            a, s = layer_bases(self._factors([layer], shards), layer, found)
            tensors = {"A": a.vectors.float(), "S": s.vectors.float(), "a": a.values, "s": s.values}
            ridges = {"ridges": torch.tensor([a.ridge, s.ridge], dtype=torch.float64)}
            save_file({k: v.cpu().contiguous() for k, v in (tensors | ridges).items()}, self._file(f"basis-{layer}"))

    def refine(self, shard: int, members: list[int]) -> None:
        """Pass over the shard's blocks again, in the eigenbases of all of the block's layers (`ekfac`)."""
        everything = self.sample.blocks()
        bases = {layer: self._recorded(layer) for layer in self.layers}
        squares = squared_gradients(
            load_model(self.model, DTYPES[self.sample.config.precision], self.device),
            {layer: (s.vectors, a.vectors) for layer, (a, s) in bases.items()},
            [everything[index] for index in members],
            fisher=self.sample.config.fisher,
            seed=self.sample.seed,
            batch_tokens=self.batch_tokens,
            device=self.device,
        )
        save_file({layer: value.cpu() for layer, value in squares.items()}, self._file(f"squares-{shard}"))

    def solve(self, layers: list[str], shards: int, progress: Reporter | None) -> dict[str, Solved]:
        """Invert the curvature of some of the block's layers and take all products."""
        inverses: dict[tuple[str, float], Inverse] = {}
        solved = {}
        for number, layer in enumerate(layers):
            if progress:
                progress(f"solve: {layer}", number, len(layers))
            solved[layer] = self._solved(layer, self._layer_solver(layer, shards, inverses))
        return solved

    def _solved(self, layer: str, solver: LayerSolver) -> Solved:
        settings = self.sample.config
        own = self._own(layer) if settings.joint else None
        solved = solutions(solver, self._set_sums(layer), len(self.sample.volumes), own)
        products = self._products(layer, solved)
        damping = None
        if own is not None:
            damping = damping_forms(solved, own)
            save_file({"x": solved.to(DTYPES[settings.precision]).cpu()}, self._solutions(layer))
        if isinstance(solver, Eigen | Divided):
            return Solved(products, solver.condition, solver.ridge, damping=damping)
        return Solved(products, damping=damping)

    def forms(self, layers: list[str], members: list[int], parts: int) -> Array:
        """[sets, sets] UᵀHU over some of the curvature's blocks, cut in so many parts; once all layers are solved.

        Args:
            layers: of all layer blocks.
        """
        settings, domains = self.sample.config, len(self.sample.volumes)
        if not members:
            return np.zeros((2 * domains, 2 * domains))
        chosen = curvature_blocks(self.sample.blocks(), domains, settings, parts)
        return quadratic_forms(
            load_model(self.model, DTYPES[settings.precision], self.device),
            lambda start, end: {
                layer: read_rows(self._solutions(layer), "x", start, end, self.device) for layer in layers
            },
            2 * domains,
            [chosen[index] for index in members],
            self.batch_tokens,
            self.device,
        )

    def _layer_solver(self, layer: str, shards: int, inverses: dict[tuple[str, float], Inverse]) -> LayerSolver:
        settings = self.sample.config
        if settings.solver == "adam":
            return Diagonal(self._own(layer))
        if settings.solver not in FACTORED:
            return Plain()
        own = self._own(layer) if settings.damping == "schedule" else None
        if settings.solver == "kfac":
            return layer_inverse(self._factors([layer], shards), layer, settings, own, inverses)
        eigenvalues = self._total("squares", layer, shards)
        return layer_curvature(layer, *self._recorded(layer), eigenvalues, settings, own, torch.float32)

    def _recorded(self, layer: str) -> tuple[Eigenbasis, Eigenbasis]:
        ridges = self._read(f"basis-{layer}", "ridges").tolist()
        a, s = (
            Eigenbasis(self._read(f"basis-{layer}", name.lower()), self._read(f"basis-{layer}", name), ridge)
            for name, ridge in zip("AS", ridges, strict=True)
        )
        return a, s

    def _own(self, layer: str) -> torch.Tensor:
        """Λ of a layer as the SFT left it."""
        return read_tensor(self.model.parent / DAMPING, f"{layer}.weight", self.device).float()

    def _factors(self, layers: list[str], shards: int) -> FactorSums:
        """The whole sample's factors of some layers."""
        sums = FactorSums()
        sums.positions = float(self._total("factors", "positions", shards))
        for layer in layers:
            sums.a[input_group(layer)] = self._total("factors", f"A/{input_group(layer)}", shards)
            sums.s[layer] = self._total("factors", f"S/{layer}", shards)
        return sums

    def _gradients(self, layer: str) -> Iterator[torch.Tensor]:
        """[d_out, d_in] every block's gradient of a layer, one after another."""
        blocks = 2 * len(self.sample.volumes) * self.sample.config.blocks
        return (self._read(f"block-{index}", layer) for index in range(blocks))

    def _products(self, layer: str, solved: torch.Tensor) -> Array:
        if self.counts is None:  # the same for all layers
            self.counts = tokens_and_weights(self.sample.blocks(), len(self.sample.volumes), self.sample.config.blocks)
        tokens, weights = self.counts
        crowded = crowded_means(self._gradients(layer), tokens[: len(weights)], weights)
        return with_sets(solved, chain(self._gradients(layer), crowded))

    def _set_sums(self, layer: str) -> torch.Tensor:
        return set_sums(self._gradients(layer), self.sample.config.blocks)

    def _total(self, kind: str, name: str, shards: int) -> torch.Tensor:
        """The sum of a tensor over all shards' files."""
        return torch.stack([self._read(f"{kind}-{s}", name) for s in range(shards)]).sum(0)

    def _file(self, name: str) -> Path:
        return self.scratch / f"{name}.safetensors"

    def _solutions(self, layer: str) -> Path:
        return self.scratch.parent / f"solutions-{layer}.safetensors"

    def _read(self, file: str, name: str) -> torch.Tensor:
        return read_tensor(self._file(file), name, self.device)


def read_tensor(path: Path, name: str, where: torch.device) -> torch.Tensor:
    """One tensor of a safetensors file; the others stay on disk."""
    with safe_open(path, framework="pt", device=str(where)) as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor


def read_rows(path: Path, name: str, start: int, end: int, where: torch.device) -> torch.Tensor:
    """[end - start, …] some rows of a tensor in a safetensors file."""
    with safe_open(path, framework="pt") as tensors:
        some: torch.Tensor = tensors.get_slice(name)[start:end]
    return some.to(where)
