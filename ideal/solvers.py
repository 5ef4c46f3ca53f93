"""From a model and a sample of blocks to the influence table, by any solver, in one process.

A solver is a matrix M; the influence of domain j on reference set r is ⟨g_r, M ḡ_j⟩. M is applied to the sum gradient
of each *set*, and never to the many blocks: their products follow from that (``block_products``).

| solver | M | passes |
| --- | --- | --- |
| `identity` | 1 | the gradients |
| `adam` | Λ⁻¹, what the optimiser itself does with a gradient | the gradients |
| `kfac` | (S + √c s̄)⁻¹ ⊗ (A + √c ā)⁻¹, or with ``divided: false`` (S ⊗ A + λ)⁻¹ | gradients and factors, at once |
| `ekfac` | the same eigenvectors with their right eigenvalues | one more |
| `exact` | (H + λ)⁻¹, all tracked layers together | one for each step of conjugate gradients and reference set |

Training with AdamW for T steps moves a weight along a constant gradient G by Σ_t η_t · G/(√v̂ + ε). So Λ = (√v̂ +
ε)/Σ_t η_t is the damping that a training run has by itself: (H + Λ)⁻¹ G is where the run ends that follows G from θ
within a quadratic (a proximal step), Λ⁻¹ G where H is small against Λ, H⁻¹ G where it is large. With ``damping:
schedule`` `exact` takes Λ as it is; `kfac` and `ekfac`, which need one number, take a layer's harmonic mean of it.

All but `exact` go layer by layer. With ``joint`` their solutions are combined anew under the curvature of all layers
together and Λ (``ideal.curvature.joint``), which takes forward passes over a few examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Protocol

import numpy as np
import torch
from torch import nn

from ideal.batches import length
from ideal.config import InfluenceConfig
from ideal.curvature.accumulate import Block, BlockGradient, FactorSums, Shares, accumulate
from ideal.curvature.ekfac import squared_gradients
from ideal.curvature.exact import GaussNewton, Vectors, conjugate_gradients
from ideal.curvature.joint import combination, damping_forms, quadratic_forms
from ideal.curvature.kfac import Divided, Eigen, Eigenbasis, Inverse, curvature, eigenbasis, inverse
from ideal.curvature.layers import input_group
from ideal.influence import Array, InfluenceTable
from ideal.model import wide

FACTORED = ("kfac", "ekfac")


class LayerSolver(Protocol):
    """M of one layer; all solvers but `exact`, which couples them."""

    def solve(self, gradient: torch.Tensor) -> torch.Tensor:
        """[..., d_out, d_in] M G."""


class Plain:
    """M = 1."""

    def solve(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


@dataclass(frozen=True)
class Diagonal:
    """M = 1/Λ with Λ [d_out, d_in] positive."""

    damping: torch.Tensor

    def solve(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient / self.damping


def layer_damping(damping: torch.Tensor) -> float:
    """The one λ that moves a layer as far as its Λ does, in the mean over its weights."""
    return float(1 / (1 / damping.double()).mean())


@dataclass(frozen=True)
class Sampled:
    """A sample's blocks and what is asked of them.

    Attributes:
        blocks: every domain's B blocks, one domain after another, then every reference set's.
        domains: how many domains; there are as many reference sets as the other blocks make.
        damping: Λ by weight, as the SFT saved it; needed by `adam`, ``joint`` and ``damping: schedule``.
    """

    blocks: Sequence[Block]
    domains: int
    settings: InfluenceConfig
    damping: Mapping[str, torch.Tensor]
    seed: int
    batch_tokens: int
    device: torch.device


def influence_tables(
    model: nn.Module, layers: list[str], sample: Sampled, solvers: Sequence[str]
) -> dict[str, InfluenceTable]:
    """The influence of every domain on every reference set by each of these solvers.

    Everything stays in memory; ``service.influence`` does the same on many workers, through files.

    Raises:
        FloatingPointError: a layer's curvature can't be inverted; it is named.
    """
    settings, where = sample.settings, sample.device
    found: list[BlockGradient] = []
    sums = accumulate(
        model,
        layers,
        sample.blocks,
        fisher=settings.fisher,
        factors=any(needs_factors(solver, settings) for solver in solvers),
        seed=sample.seed,
        batch_tokens=sample.batch_tokens,
        device=where,
        done=lambda _, gradient: found.append(gradient),
        shares=factor_shares(sample.blocks, settings),
    )
    own = {layer: wide(sample.damping[f"{layer}.weight"].to(where)) for layer in layers} if sample.damping else {}
    known: dict[str, Eigenbasis] = {}
    inverses: dict[tuple[str, float], Inverse] = {}
    eigen = any(needs_eigenvectors(solver, settings) for solver in solvers)
    bases = {layer: layer_bases(sums, layer, known) for layer in layers} if eigen else {}
    refined = _refined(model, bases, sample, sums.s[layers[0]].dtype) if "ekfac" in solvers else {}
    tables = {}
    gradients = [block.gradients for block in found]
    sizes = [(block.tokens, block.loss) for block in found]
    tokens = np.array([size for size, _ in sizes], float).reshape(-1, settings.blocks)
    sums_by_set = {layer: set_sums([g[layer] for g in gradients], settings.blocks) for layer in layers}
    for solver in solvers:
        if solver == "exact":
            solved = _exactly(model, layers, sums, sums_by_set, sample, own)
        else:
            solved = {
                layer: _layer_solver(solver, layer, bases, inverses, refined, sums, settings, own).solve(
                    sums_by_set[layer]
                )
                for layer in layers
            }
        products = {layer: with_sets(solved[layer], (g[layer] for g in gradients)) for layer in layers}
        if coupled(solver, settings):
            damping = [damping_forms(x, own[layer]) for layer, x in solved.items()]
            products = combined(products, _forms(model, solved, sample), damping, settings.blocks)
        rows = [block_products(p, tokens, sample.domains) for p in products.values()]
        tables[solver] = table_of(rows, sizes, sample.domains, settings.blocks)
    return tables


def coupled(solver: str, settings: InfluenceConfig) -> bool:
    """Whether the layers' solutions are combined anew: `exact` has coupled them already."""
    return settings.joint and solver != "exact"


def needs_factors(solver: str, settings: InfluenceConfig) -> bool:
    """Whether a solver asks for S and A: `exact` for their traces alone, where its damping is relative to them."""
    return solver in FACTORED or (solver == "exact" and settings.damping != "schedule")


def needs_eigenvectors(solver: str, settings: InfluenceConfig) -> bool:
    """Whether a solver works in the factors' eigenbases."""
    return solver == "ekfac" or (solver == "kfac" and not settings.divided)


def factor_shares(blocks: Sequence[Block], settings: InfluenceConfig) -> Shares:
    """As ``influence.positions`` asks for it, of the positions in all of the sample's blocks."""
    total = sum(length(item) for block in blocks if block.weight > 0 for item in block.items)
    return lambda width: min(1.0, settings.positions * width / total) if settings.positions else 1.0


def table_of(rows: Sequence[Array], sizes: Sequence[tuple[int, float]], domains: int, blocks: int) -> InfluenceTable:
    """The table from each layer's [domain blocks, reference blocks] products.

    Args:
        sizes: (supervised tokens, summed loss) of every block, domains' first.
    """
    tokens = np.array([size for size, _ in sizes], float).reshape(-1, blocks)
    losses = np.array([loss for _, loss in sizes]).reshape(-1, blocks)
    references = len(tokens) - domains
    return InfluenceTable(
        np.stack([row.reshape(domains, blocks, references, blocks) for row in rows]),
        tokens[:domains],
        tokens[domains:],
        losses[domains:].sum(1) / tokens[domains:].sum(1),
    )


def layer_bases(
    sums: FactorSums, layer: str, known: dict[str, Eigenbasis] | None = None
) -> tuple[Eigenbasis, Eigenbasis]:
    """(of A, of S) of a layer.

    Args:
        known: the last layer's basis of A by input group: layers that share an input share the decomposition.

    Raises:
        FloatingPointError: one of them can't be decomposed; the layer is named.
    """
    known, group = {} if known is None else known, input_group(layer)
    try:
        if group not in known:
            known.clear()
            known[group] = eigenbasis(sums.a[group] / sums.positions)
        return known[group], eigenbasis(sums.s[layer] / sums.positions)
    except FloatingPointError as error:
        raise FloatingPointError(f"influence: layer {layer} {error}") from None


def exact_damping(
    sums: FactorSums, layers: Sequence[str], settings: InfluenceConfig, own: Callable[[str], torch.Tensor]
) -> dict[str, torch.Tensor | float]:
    """Λ of `exact`: AdamW's, or a multiple of each layer's mean eigenvalue, which its factors' traces give.

    Args:
        own: a layer's AdamW's Λ.
    """
    if settings.damping == "schedule":
        return {layer: own(layer) for layer in layers}
    means = {
        layer: float(sums.a[input_group(layer)].diagonal().mean() * sums.s[layer].diagonal().mean() / sums.positions)
        for layer in layers
    }
    return {layer: settings.damping * mean for layer, mean in means.items()}


def curvature_blocks(blocks: Sequence[Block], domains: int, settings: InfluenceConfig, parts: int = 1) -> list[Block]:
    """Equally many examples of each domain, from all of its blocks in turn, with weights that sum to the domain's.

    Args:
        parts: blocks to deal a domain's examples to; as few as there is work to divide, since batches are made of one.
    """
    taken: list[Block] = []
    each = -(-settings.curvature_examples // domains)
    for j in range(domains):
        own = blocks[j * settings.blocks : (j + 1) * settings.blocks]
        rows = zip_longest(*(zip(block.items, block.keys, strict=True) for block in own))
        items, keys = zip(*[pair for row in rows for pair in row if pair][:each], strict=True)
        dealt = [Block(own[0].set, n, items[n::parts], keys[n::parts], 1.0) for n in range(min(parts, len(items)))]
        tokens = sum(block.supervised() for block in dealt)
        weight = own[0].weight * sum(block.supervised() for block in own) / tokens
        taken += [replace(block, weight=weight) for block in dealt]
    return taken


def _layer_solver(
    solver: str,
    layer: str,
    bases: Mapping[str, tuple[Eigenbasis, Eigenbasis]],
    inverses: dict[tuple[str, float], Inverse],
    refined: Mapping[str, torch.Tensor],
    sums: FactorSums,
    settings: InfluenceConfig,
    own: Mapping[str, torch.Tensor],
) -> LayerSolver:
    if solver == "adam":
        return Diagonal(own[layer])
    if solver not in FACTORED:
        return Plain()
    if not needs_eigenvectors(solver, settings):
        return layer_inverse(sums, layer, settings, own.get(layer), inverses)
    a, s = bases[layer]
    better = refined[layer] if solver == "ekfac" else None
    return layer_curvature(layer, a, s, sums.positions, settings, own.get(layer), better, sums.s[layer].dtype)


def layer_inverse(
    sums: FactorSums,
    layer: str,
    settings: InfluenceConfig,
    own: torch.Tensor | None,
    known: dict[tuple[str, float], Inverse],
) -> Divided:
    """A layer's K-FAC inverse with its damping divided between the factors.

    Args:
        known: the last layer's inverse of A by input group and damping.

    Raises:
        FloatingPointError: there is none; the layer is named.
    """
    group, dtype = input_group(layer), sums.s[layer].dtype
    a, s = sums.a[group] / sums.positions, sums.s[layer] / sums.positions
    try:
        if settings.damping == "schedule":
            assert own is not None, "the schedule's damping is the optimiser's"
            mean = sums.positions * float(a.diagonal().mean() * s.diagonal().mean())
            damping = layer_damping(own) / mean if mean else 0.0
        else:
            damping = settings.damping
        if (group, damping) not in known:
            known.clear()
            known[group, damping] = inverse(a, damping)
        return Divided(known[group, damping], inverse(s, damping), sums.positions, dtype)
    except FloatingPointError as error:
        raise FloatingPointError(f"influence: layer {layer} {error}") from None


def layer_curvature(
    layer: str,
    a: Eigenbasis,
    s: Eigenbasis,
    positions: float,
    settings: InfluenceConfig,
    own: torch.Tensor | None,
    refined: torch.Tensor | None,
    dtype: torch.dtype,
) -> Eigen:
    """A layer's damped curvature as the settings ask for it.

    Raises:
        FloatingPointError: there is none; the layer is named.
    """
    scheduled = settings.damping == "schedule"
    try:
        return curvature(
            a,
            s,
            positions,
            0.0 if settings.damping == "schedule" else settings.damping,
            dtype,
            refined=refined,
            absolute=layer_damping(own) if scheduled and own is not None else None,
        )
    except FloatingPointError as error:
        raise FloatingPointError(f"influence: layer {layer} {error}") from None


def _refined(
    model: nn.Module, bases: Mapping[str, tuple[Eigenbasis, Eigenbasis]], sample: Sampled, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    return squared_gradients(
        model,
        {layer: (s.vectors.to(dtype), a.vectors.to(dtype)) for layer, (a, s) in bases.items()},
        sample.blocks,
        fisher=sample.settings.fisher,
        seed=sample.seed,
        batch_tokens=sample.batch_tokens,
        device=sample.device,
    )


def _exactly(
    model: nn.Module,
    layers: list[str],
    sums: FactorSums,
    gradients: Vectors,
    sample: Sampled,
    own: Mapping[str, torch.Tensor],
) -> Vectors:
    chosen = curvature_blocks(sample.blocks, sample.domains, sample.settings)
    return conjugate_gradients(
        GaussNewton(model, layers, chosen, sample.batch_tokens, sample.device).product,
        gradients,
        exact_damping(sums, layers, sample.settings, own.__getitem__),
        tolerance=sample.settings.residual,
        limit=sample.settings.products,
    ).vectors


def _forms(model: nn.Module, solved: Vectors, sample: Sampled) -> Array:
    """[sets, sets] UᵀHU of the sets' solutions."""
    return quadratic_forms(
        model,
        lambda start, end: {layer: x[start:end] for layer, x in solved.items()},
        len(next(iter(solved.values()))),
        curvature_blocks(sample.blocks, sample.domains, sample.settings),
        sample.batch_tokens,
        sample.device,
    )


def combined(products: Mapping[str, Array], forms: Array, damping: Sequence[Array], blocks: int) -> dict[str, Array]:
    """Each layer's [blocks, sets] products with the combined solutions, from those with its own.

    Args:
        forms: [sets, sets] UᵀHU.
        damping: each layer's part of UᵀΛU.
        blocks: in each set.
    """
    total = np.sum(list(products.values()), 0)
    between = total.reshape(-1, blocks, total.shape[1]).sum(1).T
    w = combination(np.sum([forms, *damping], 0), between)
    return {layer: p @ w for layer, p in products.items()}


def set_sums(gradients: Iterable[torch.Tensor], blocks: int) -> torch.Tensor:
    """[sets, d_out, d_in] sums over each set's blocks; the gradients are looked at one after another."""
    found: list[torch.Tensor] = []
    for number, gradient in enumerate(gradients):
        if number % blocks:
            found[-1] += gradient
        else:
            found.append(gradient.clone())
    return torch.stack(found)


def with_sets(solved: torch.Tensor, gradients: Iterable[torch.Tensor]) -> Array:
    """[blocks, sets] ⟨x_s, g_b⟩ of every block with every set's solution.

    Args:
        solved: [sets, d_out, d_in] x = M g.
        gradients: [d_out, d_in] sums of every block, looked at one after another.
    """
    rows = [solved.flatten(1) @ gradient.flatten() for gradient in gradients]
    return np.asarray(torch.stack(rows).double().cpu().numpy())


def block_products(products: Array, tokens: Array, domains: int) -> Array:
    """[domain blocks, reference blocks] products of one layer from one solution for each *set*.

    The influence is bilinear in the two gradients, so with s = a block's share of its set's tokens and x = M g,

        P_jb,rc = s_rc ⟨x_r, g_jb⟩ + s_jb ⟨x_j, g_rc⟩ − s_jb s_rc ½(⟨x_r, g_j⟩ + ⟨x_j, g_r⟩)

    is ⟨g_rc, M g_jb⟩ but for how two blocks' deviations from their sets' means meet, a term of second order that no sum
    over all blocks of either side sees. So it gives the influence and any part of one side exactly, and the bootstrap
    of both to first order, for 2·sets products with M in place of 2·sets·B.

    Args:
        products: [blocks, sets] as ``with_sets`` gives them, domains first.
        tokens: [sets, B] supervised tokens.
    """
    split, shares = domains * tokens.shape[1], (tokens / tokens.sum(1, keepdims=True)).ravel()
    of_domain = products[:split, domains:]
    of_reference = products[split:, :domains]
    blocks = tokens.shape[1]
    by_domain = of_domain.reshape(domains, blocks, -1).sum(1)
    by_reference = of_reference.reshape(-1, blocks, domains).sum(1).T
    middle = np.kron((by_domain + by_reference) / 2, np.ones((blocks, blocks)))
    mine, theirs = shares[:split, None], shares[None, split:]
    return np.asarray(
        np.repeat(of_domain, blocks, 1) * theirs + np.repeat(of_reference, blocks, 1).T * mine - middle * mine * theirs
    )
