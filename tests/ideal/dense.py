"""A mixture on the tiny model, with its gradients, its curvature and an optimiser's Λ as dense vectors and matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LlamaForCausalLM

from ideal.data.batches import collate
from ideal.influence.accumulate import Block, FactorSums
from ideal.influence.exact import Vectors
from ideal.influence.layers import input_group
from ideal.influence.table import Array, split
from ideal.model.base import supervised_logits
from tests.ideal.made import MLP, example_set, full_loss

DOMAINS = [example_set(6, 1), example_set(5, 2)]
REFERENCES = [example_set(4, 3), example_set(5, 4)]
WEIGHTS = [0.7, 0.3]


def blocks(blocks_each: int = 2) -> list[Block]:
    return [
        block
        for number, (domain, weight) in enumerate(zip(DOMAINS, WEIGHTS, strict=True))
        for block in split(f"train/{number}", domain, list(range(len(domain))), blocks_each, weight)
    ]


def sizes(model: LlamaForCausalLM, layers: Sequence[str] = MLP) -> dict[str, torch.Size]:
    return {layer: model.get_parameter(f"{layer}.weight").shape for layer in layers}


def flat(vectors: Vectors) -> torch.Tensor:
    """[K, n] all layers side by side."""
    return torch.cat([vectors[layer].flatten(1) for layer in MLP], 1)


def random_vectors(model: LlamaForCausalLM, count: int, seed: int) -> Vectors:
    random = torch.Generator().manual_seed(seed)
    return {x: torch.randn(count, *s, generator=random, dtype=torch.float64) for x, s in sizes(model).items()}


def dense_gauss_newton(model: LlamaForCausalLM, layers: Sequence[str] = MLP) -> torch.Tensor:
    """[n, n] Σ weight Jᵀ(diag p − p pᵀ)J, position by position: the definition."""
    weights = [model.get_parameter(f"{layer}.weight").requires_grad_() for layer in layers]
    n = sum(w.numel() for w in weights)
    found = torch.zeros(n, n, dtype=torch.float64)
    for block in blocks():
        for item in block.items:
            for z in supervised_logits(model, collate([item])):
                rows = [torch.autograd.grad(value, weights, retain_graph=True) for value in z]
                j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
                p = z.detach().softmax(0)
                found += block.weight * j.T @ (torch.diag(p) - torch.outer(p, p)) @ j
    return found


def mean_gradients(model: LlamaForCausalLM, examples: object, layers: Sequence[str] = MLP) -> torch.Tensor:
    """[n] by plain autograd."""
    model.requires_grad_(True)
    total, count = full_loss(model, examples)  # type: ignore[arg-type]
    found = torch.autograd.grad(total / count, [model.get_parameter(f"{layer}.weight") for layer in layers])
    model.requires_grad_(False)
    return torch.cat([g.flatten() for g in found])


def lambdas(model: LlamaForCausalLM, seed: int = 5, layers: Sequence[str] = MLP) -> dict[str, torch.Tensor]:
    """An optimiser's Λ by weight, over two orders of magnitude."""
    random = torch.Generator().manual_seed(seed)
    return {
        f"{layer}.weight": 10 ** (2 * torch.rand(s, generator=random, dtype=torch.float64) - 2)
        for layer, s in sizes(model, layers).items()
    }


def diagonal(own: dict[str, torch.Tensor]) -> torch.Tensor:
    """[n] an optimiser's Λ of all layers."""
    return torch.cat([part.flatten() for part in own.values()])


def layer_by_layer(model: LlamaForCausalLM, h: torch.Tensor) -> torch.Tensor:
    """[n, n] the matrix without what is between layers."""
    counts = [shape.numel() for shape in sizes(model).values()]
    return torch.block_diag(*(part.split(counts, 1)[n] for n, part in enumerate(h.split(counts))))


def factored(sums: FactorSums, damping: float, layers: Sequence[str] = MLP) -> dict[str, torch.Tensor]:
    """[n, n] by layer: K-FAC's curvature, its damping divided between the factors, by definition: positions times the
    Kronecker product of the damped means of g gᵀ and a aᵀ over positions."""

    def damped(total: torch.Tensor) -> torch.Tensor:
        mean = total / sums.positions
        return mean + damping**0.5 * mean.trace() / len(mean) * torch.eye(len(mean)).to(mean)

    return {
        layer: sums.positions * torch.kron(damped(sums.s[layer]), damped(sums.a[input_group(layer)]))
        for layer in layers
    }


def projected(g: torch.Tensor, r: torch.Tensor, u: torch.Tensor, matrix: torch.Tensor) -> Array:
    """[domains, reference sets] G U (Uᵀ M U)⁻¹ Uᵀ R: what `joint` is by definition.

    Args:
        g, r, u: [·, n] the domains' and the reference sets' mean gradients, and the directions.
        matrix: [n, n] M, damped.
    """
    return np.asarray((g @ u.T @ torch.linalg.solve(u @ matrix @ u.T, u @ r.T)).numpy())
