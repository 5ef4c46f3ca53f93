"""From solutions to the influence table: products of every block with every set's solution, and their sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from ideal.curvature.joint import combination
from ideal.influence import Array, InfluenceTable


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
