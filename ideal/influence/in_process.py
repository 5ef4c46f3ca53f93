"""From a model and a sample of blocks to the influence table, by any solver, in one process.

``service.stages.influence`` does the same on many workers, through files; `exact`, a reference for the others, is here
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import nn

from ideal.config.config import InfluenceConfig
from ideal.influence.accumulate import BlockGradient, FactorSums, accumulate
from ideal.influence.ekfac import squared_gradients
from ideal.influence.exact import GaussNewton, Vectors, conjugate_gradients
from ideal.influence.joint import damping_forms, quadratic_forms
from ideal.influence.kfac import Eigenbasis, Inverse
from ideal.influence.products import combined, crowded_means, set_sums, table_of, with_sets
from ideal.influence.sampled import Sampled, curvature_blocks, tokens_and_weights
from ideal.influence.solvers import (
    FACTORED,
    Diagonal,
    LayerSolver,
    Plain,
    coupled,
    exact_damping,
    layer_bases,
    layer_curvature,
    layer_inverse,
    needs_factors,
    solutions,
)
from ideal.influence.table import Array, InfluenceTable
from ideal.model.base import wide


def influence_tables(
    model: nn.Module, layers: list[str], sample: Sampled, solvers: Sequence[str]
) -> dict[str, InfluenceTable]:
    """The influence of every domain on every reference set by each of these solvers.

    Everything stays in memory.

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
    )
    own = {layer: wide(sample.damping[f"{layer}.weight"].to(where)) for layer in layers} if sample.damping else {}
    known: dict[str, Eigenbasis] = {}
    inverses: dict[tuple[str, float], Inverse] = {}
    bases = {layer: layer_bases(sums, layer, known) for layer in layers} if "ekfac" in solvers else {}
    refined = _refined(model, bases, sample, sums.s[layers[0]].dtype) if bases else {}
    tables = {}
    gradients = [block.gradients for block in found]
    sizes = [(block.tokens, block.loss) for block in found]
    tokens, weights = tokens_and_weights(sample.blocks, sample.domains, settings.blocks)
    crowded = {
        layer: crowded_means((g[layer] for g in gradients), tokens[: sample.domains], weights) for layer in layers
    }
    sums_by_set = {layer: set_sums([g[layer] for g in gradients], settings.blocks) for layer in layers}
    for solver in solvers:
        if solver == "exact":
            solved = _exactly(model, layers, sums, sums_by_set, sample, own)
        else:
            solved = {
                layer: solutions(
                    _layer_solver(solver, layer, bases, inverses, refined, sums, settings, own),
                    sums_by_set[layer],
                    sample.domains,
                    own[layer] if coupled(solver, settings) else None,
                )
                for layer in layers
            }
        products = {
            layer: with_sets(solved[layer], chain((g[layer] for g in gradients), crowded[layer])) for layer in layers
        }
        if coupled(solver, settings):
            damping = [damping_forms(x, own[layer]) for layer, x in solved.items()]
            products = combined(products, _forms(model, solved, sample), damping, settings.blocks)
        tables[solver] = table_of(list(products.values()), sizes, weights, settings.blocks)
    return tables


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
    if solver == "kfac":
        return layer_inverse(sums, layer, settings, own.get(layer), inverses)
    return layer_curvature(layer, *bases[layer], refined[layer], settings, own.get(layer), sums.s[layer].dtype)


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
