"""The damped Gauss-Newton system of all tracked layers together, solved by conjugate gradients.

For the mixture's mean loss per supervised token, with logits z(θ) and softmax p at each supervised position,

    H = Σ_n weight_n Σ_t J_ntᵀ (diag p − p pᵀ) J_nt,      J = ∂z/∂θ over the tracked weights,

which is the Fisher of labels drawn from the model, without sampling and without blocks: it sees what one layer's
change does to another's. A product H v is one forward pass with tangents and one backward pass (Schraudolph 2002).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ideal.data.batches import Batch, batches
from ideal.influence.accumulate import Block
from ideal.model.base import supervised_logits

Vectors = dict[str, torch.Tensor]
"""[K, d_out, d_in] by layer: K vectors over the tracked weights."""


class GaussNewton:
    """v → H v over a sample.

    Args:
        layers: tracked layers.
        blocks: those with weight enter.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], blocks: Sequence[Block], batch_tokens: int, device: torch.device
    ) -> None:
        self.model = model.requires_grad_(False)
        self.weights: Vectors = {layer: model.get_parameter(f"{layer}.weight") for layer in layers}
        self.batches = [
            (batch, block.weight)
            for block in blocks
            if block.weight > 0
            for _, batch in batches(block.items, batch_tokens)
        ]
        self.device = device

    def product(self, vectors: Vectors) -> Vectors:
        """H v of K vectors, over this sample."""
        total = {layer: torch.zeros_like(v) for layer, v in vectors.items()}
        count = len(next(iter(vectors.values())))
        for batch, weight in self.batches:
            moved = batch.to(self.device)
            for k in range(count):
                for layer, part in self._one(moved, {layer: v[k] for layer, v in vectors.items()}).items():
                    total[layer][k].add_(part, alpha=weight)
        return total

    def _one(self, batch: Batch, vector: Vectors) -> Vectors:
        weights = {layer: w.detach().requires_grad_() for layer, w in self.weights.items()}
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            duals = {f"model.{x}.weight": forward_ad.make_dual(w, vector[x].to(w)) for x, w in weights.items()}  # type: ignore[no-untyped-call]
            dual = functional_call(Logits(self.model), duals, (batch,))
            logits, moved = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
            p = logits.detach().softmax(-1)
            tangent = p * (moved.detach() - (p * moved.detach()).sum(-1, keepdim=True))
        gradients = torch.autograd.grad(logits, list(weights.values()), tangent)
        return dict(zip(weights, gradients, strict=True))


class Logits(nn.Module):
    """The supervised logits as a module's forward, which ``functional_call`` can give other weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        return supervised_logits(self.model, batch)


@dataclass(frozen=True)
class Solution:
    """x of (H + Λ) x = b.

    Attributes:
        vectors: K solutions.
        residuals: [K] ‖b − (H + Λ) x‖ / ‖b‖.
        products: how many times H was applied.
    """

    vectors: Vectors
    residuals: list[float]
    products: int


def conjugate_gradients(
    product: Callable[[Vectors], Vectors],
    b: Vectors,
    damping: Mapping[str, torch.Tensor | float],
    *,
    tolerance: float,
    limit: int,
) -> Solution:
    """Solve (H + Λ) x = b for K right-hand sides at once, preconditioned by Λ (Hestenes & Stiefel 1952).

    Args:
        product: v → H v, H symmetric and not below 0.
        damping: Λ by layer: a number, or a positive diagonal [d_out, d_in].
        tolerance: of every residual, relative.
        limit: most products.

    Returns:
        the best there is after ``limit`` products, with its residuals: whether they are small is the caller's to say.
    """

    def inner(u: Vectors, v: Vectors) -> torch.Tensor:
        return torch.stack([(u[x].double() * v[x]).sum((1, 2)) for x in u]).sum(0)

    def combine(u: Vectors, scale: torch.Tensor, v: Vectors) -> Vectors:
        return {x: u[x] + scale.to(u[x])[:, None, None] * v[x] for x in u}

    x = {layer: torch.zeros_like(v) for layer, v in b.items()}
    r = dict(b)
    z = {layer: v / damping[layer] for layer, v in r.items()}
    p, rz, size = z, inner(r, z), inner(b, b).sqrt().clamp(min=1e-300)
    done = 0
    while done < limit and bool((inner(r, r).sqrt() / size > tolerance).any()):
        hp = {layer: v + damping[layer] * p[layer] for layer, v in product(p).items()}
        step = rz / inner(p, hp).clamp(min=1e-300)
        x, r = combine(x, step, p), combine(r, -step, hp)
        z = {layer: v / damping[layer] for layer, v in r.items()}
        rz, before = inner(r, z), rz
        p = combine(z, rz / before.clamp(min=1e-300), p)
        done += 1
    return Solution(x, (inner(r, r).sqrt() / size).tolist(), done)
