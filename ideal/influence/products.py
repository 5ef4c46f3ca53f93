"""From solutions to the influence table: products of every block with every set's solution, and their sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from ideal.influence.joint import combination
from ideal.influence.table import Array, InfluenceTable


def set_sums(gradients: Iterable[torch.Tensor], blocks: int) -> torch.Tensor:
    """[sets, d_out, d_in] sums over each set's blocks; the gradients are looked at one after another."""
    found: list[torch.Tensor] = []
    for number, gradient in enumerate(gradients):
        if number % blocks:
            found[-1] += gradient
        else:
            found.append(gradient.clone())
    return torch.stack(found)


def crowded_means(gradients: Iterable[torch.Tensor], tokens: Array, weights: Sequence[float]) -> list[torch.Tensor]:
    """M times [d_out, d_in] ρ_j ∘ ḡ: the mixture's mean gradient, each weight of it times how noisy it is in domain j.

    ρ_j = s_j²/s̄², s_j² the mean squared gradient of a token of domain j and s̄² the mixture's. A batch's gradient is
    mostly noise, so s_j² is measured by how a domain's B blocks scatter about their mean:

        s_j² = (Σ_b G_jb²/T_jb − G_j²/T_j) / (B − 1),        s̄² = Σ_j w_j s_j²

    Args:
        gradients: [d_out, d_in] sums of every domain block, looked at one after another; further ones are left out.
        tokens: [M, B] their supervised tokens.
        weights: [M] w_j.
    """
    scatter: list[torch.Tensor] = []
    every = iter(gradients)
    mixed: torch.Tensor | None = None
    for counts, weight in zip(tokens, weights, strict=True):
        gradient = next(every)
        mean, squares = gradient / counts.sum(), gradient.square().div_(counts[0])
        for count in counts[1:]:
            gradient = next(every)
            mean.add_(gradient, alpha=1 / counts.sum())
            squares.addcmul_(gradient, gradient, value=1 / count)
        del gradient  # before the next is read
        scatter.append(squares.addcmul_(mean, mean, value=-counts.sum()).clamp_(min=0))  # B − 1 cancels in ρ
        mixed = mean.mul_(weight) if mixed is None else mixed.add_(mean, alpha=weight)
    assert mixed is not None
    whole = torch.zeros_like(mixed)
    for part, weight in zip(scatter, weights, strict=True):
        whole.add_(part, alpha=weight)
    mixed.div_(whole.clamp_(min=torch.finfo(whole.dtype).tiny))
    return [part.mul_(mixed) for part in scatter]


def with_sets(solved: torch.Tensor, gradients: Iterable[torch.Tensor]) -> Array:
    """[blocks, sets] ⟨x_s, g_b⟩ of every block with every set's solution.

    Args:
        solved: [sets, d_out, d_in] x = M g.
        gradients: [d_out, d_in] sums of every block, looked at one after another.
    """
    rows = [solved.flatten(1) @ gradient.flatten() for gradient in gradients]
    return np.asarray(torch.stack(rows).double().cpu().numpy())


def combined(products: Mapping[str, Array], forms: Array, damping: Sequence[Array], blocks: int) -> dict[str, Array]:
    """Each layer's [blocks, sets] products with the combined solutions, from those with its own.

    Args:
        products: the blocks', and below them any other rows.
        forms: [sets, sets] UᵀHU.
        damping: each layer's part of UᵀΛU.
        blocks: in each set.
    """
    total = np.sum(list(products.values()), 0)
    sets = total.shape[1]
    between = total[: sets * blocks].reshape(sets, blocks, sets).sum(1).T
    w = combination(np.sum([forms, *damping], 0), between)
    return {layer: p @ w for layer, p in products.items()}


def block_products(products: Array, tokens: Array, domains: int) -> Array:
    """[domain blocks, reference blocks] products of one layer from one solution for each *set*.

    The influence is bilinear in the two gradients, so with s = a block's share of its set's tokens and x = M g,

        P_jb,rc = s_rc ⟨x_r, g_jb⟩ + s_jb ⟨x_j, g_rc⟩ − s_jb s_rc ½(⟨x_r, g_j⟩ + ⟨x_j, g_r⟩)

    is ⟨g_rc, M g_jb⟩ but for how two blocks' deviations from their sets' means meet, a term of second order that no sum
    over all blocks of either side sees. So it gives the influence and any part of one side exactly, and the bootstrap
    of both to first order, for 2·sets products with M in place of 2·sets·B.

    Args:
        products: [blocks, sets] as ``with_sets`` gives them, domains first; further rows are left out.
        tokens: [sets, B] supervised tokens.
    """
    split, shares = domains * tokens.shape[1], (tokens / tokens.sum(1, keepdims=True)).ravel()
    of_domain = products[:split, domains:]
    of_reference = products[split : tokens.size, :domains]
    blocks = tokens.shape[1]
    by_domain = of_domain.reshape(domains, blocks, -1).sum(1)
    by_reference = of_reference.reshape(-1, blocks, domains).sum(1).T
    middle = np.kron((by_domain + by_reference) / 2, np.ones((blocks, blocks)))
    mine, theirs = shares[:split, None], shares[None, split:]
    return np.asarray(
        np.repeat(of_domain, blocks, 1) * theirs + np.repeat(of_reference, blocks, 1).T * mine - middle * mine * theirs
    )


def table_of(
    products: Sequence[Array], sizes: Sequence[tuple[int, float]], weights: Sequence[float], blocks: int
) -> InfluenceTable:
    """The table from each layer's products with the sets' solutions.

    Args:
        products: [blocks + M, sets] of every block, domains' first, then of ``crowded_means``.
        sizes: (supervised tokens, summed loss) of every block, domains' first.
        weights: [M] w_j.
    """
    domains = len(weights)
    tokens = np.array([size for size, _ in sizes], float).reshape(-1, blocks)
    losses = np.array([loss for _, loss in sizes]).reshape(-1, blocks)
    shape = (domains, blocks, len(tokens) - domains, blocks)
    rows = np.stack([block_products(part, tokens, domains).reshape(shape) for part in products])
    crowded = np.sum(products, 0)[tokens.size :, domains:] / tokens[domains:].sum(1)
    return InfluenceTable(
        rows,
        tokens[:domains],
        tokens[domains:],
        losses[domains:].sum(1) / tokens[domains:].sum(1),
        crowded - np.asarray(weights) @ crowded,
    )
