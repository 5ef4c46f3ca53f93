"""All layers together: what layer-by-layer solutions of a few sets become under the curvature of the whole model.

A solver that goes layer by layer gives x_s = M g_s for every set s, each layer's as if the others stood still. With
U = [x_1 … x_K] of all layers, H the curvature of all tracked layers, and Λ what AdamW damps with (``ideal.solvers``),
the system (H + Λ) x = g is solved once more within the span of U, which takes K × K numbers (a Galerkin projection):

    (Uᵀ H U + Uᵀ Λ U) W = Uᵀ G,        x'_s = U w_s

So the solutions are combined anew: each is as long as the whole model's curvature allows, and pays for what it does
to the other sets. As both sides of an influence lie in the span, its error is the product of theirs.

UᵀHU needs no backward pass: with logits z, softmax p, and tangents J u = ∂z/∂θ u from a forward pass,

    u_kᵀ H u_l = Σ_n weight_n Σ_t cov_p(J_nt u_k, J_nt u_l)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ideal.batches import Batch, batches
from ideal.curvature.accumulate import Block
from ideal.curvature.exact import Logits
from ideal.influence import Array
from ideal.model import wide


def quadratic_forms(
    model: nn.Module,
    direction: Callable[[int], Mapping[str, torch.Tensor]],
    count: int,
    blocks: Sequence[Block],
    batch_tokens: int,
    device: torch.device,
) -> Array:
    """[K, K] UᵀHU over a sample; parts of a sample add up.

    Args:
        direction: u_k by layer, [d_out, d_in]; asked for again in every batch, so that one is held at a time.
        count: K.
        blocks: those with weight enter.
        batch_tokens: in a forward pass, the tangents of all directions counted.
    """
    logits = Logits(model.requires_grad_(False))
    total = torch.zeros(count, count, dtype=torch.float64, device=device)
    for block in blocks:
        if not block.weight > 0:
            continue
        for _, batch in batches(block.items, max(1, batch_tokens // count)):
            moved = batch.to(device)
            rows = torch.stack([_centred_tangents(logits, direction(k), moved).flatten() for k in range(count)])
            total += block.weight * (rows @ rows.T).double()
    return np.asarray(total.cpu().numpy())


def _centred_tangents(logits: Logits, direction: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """[s, V] √p (J u − E_p J u) at each supervised position: products of two are covariances."""
    weights = {f"model.{layer}.weight": logits.model.get_parameter(f"{layer}.weight").detach() for layer in direction}
    u = {f"model.{layer}.weight": part.to(weights[f"model.{layer}.weight"]) for layer, part in direction.items()}

    def at(values: dict[str, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = functional_call(logits, values, (batch,))
        return found

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found = jvp(at, (weights,), (u,))
        p, tangent = wide(found[0]).softmax(-1), wide(found[1])
        return tangent.sub_((tangent * p).sum(-1, keepdim=True)).mul_(p.sqrt_())


def damping_forms(u: torch.Tensor, damping: torch.Tensor) -> Array:
    """[K, K] a layer's part of UᵀΛU.

    Args:
        u: [K, d_out, d_in].
        damping: [d_out, d_in] Λ.
    """
    return np.asarray(((u * damping).flatten(1) @ u.flatten(1).T).double().cpu().numpy())


def combination(forms: Array, products: Array) -> Array:
    """[K, K] W; where directions depend on each other, the smallest of the equal answers.

    Args:
        forms: Uᵀ(H + Λ)U.
        products: UᵀG.
    """
    scale = 1 / np.sqrt(np.maximum(np.diag(forms), np.finfo(float).tiny))[:, None]
    return np.asarray(scale * np.linalg.lstsq(forms * scale * scale.T, products * scale, rcond=1e-10)[0])
