"""Newton's step within the span of the optimiser's own directions: one for each reference set.

With Λ what AdamW divides by (see ``ideal.solvers``), u_r = Λ⁻¹ g_r is where it goes along reference set r's gradient.
The system (H + Λ) x = g_r of all tracked layers together is solved within the span of U = [u_1 … u_R], which takes
R × R numbers. With D = Uᵀ Λ U = [⟨u_r, g_s⟩],

    x_r = U c_r,   (Uᵀ H U + D) c_r = Uᵀ g_r
    a_jr = ⟨ḡ_j, x_r⟩ = Σ_s ⟨ḡ_j, u_s⟩ W_sr,      W = (Uᵀ H U + D)⁻¹ D

So the answer is `adam`'s products times W: what the curvature leaves of a direction, and what the others have of it.
K-FAC has every direction of each layer by itself, this has R directions of all layers together.

UᵀHU needs no backward pass: with logits z, softmax p, and tangents J u = ∂z/∂θ u from a forward pass,

    u_rᵀ H u_s = Σ_n weight_n Σ_t cov_p(J_nt u_r, J_nt u_s)
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
from ideal.influence import Array, InfluenceTable
from ideal.model import wide


def quadratic_forms(
    model: nn.Module,
    direction: Callable[[int], Mapping[str, torch.Tensor]],
    count: int,
    blocks: Sequence[Block],
    batch_tokens: int,
    device: torch.device,
) -> Array:
    """[R, R] UᵀHU over a sample; parts of a sample add up.

    Args:
        direction: u_r by layer, [d_out, d_in]; asked for again in every batch, so that one is held at a time.
        count: R.
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
            rows = torch.stack([_centred_tangents(logits, direction(r), moved).flatten() for r in range(count)])
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


def left_over(forms: Array, own: Array) -> Array:
    """[R, R] W; where directions depend on each other, the smallest of the equal answers.

    Args:
        forms: UᵀHU.
        own: D.
    """
    scale = 1 / np.sqrt(np.maximum(np.diag(own), np.finfo(float).tiny))
    both = np.outer(scale, scale)
    found = np.linalg.lstsq((forms + own) * both, own * both, rcond=1e-10)[0]
    return np.asarray(found * scale[:, None] / scale)


def corrected(table: InfluenceTable, w: Array) -> InfluenceTable:
    """`adam`'s table as `subspace`'s.

    What other reference sets add to a set's column is the same in each of its blocks, by tokens: a bootstrap
    resamples the set whose loss it is about and the domains, and keeps the others and W.

    Args:
        w: [R, R] W.
    """
    tokens = table.reference_tokens
    others = table.products.sum(4) / tokens.sum(1) @ (w - np.diag(np.diag(w)))
    products = table.products * np.diag(w)[:, None] + others[..., None] * tokens
    return InfluenceTable(products, table.domain_tokens, tokens, table.reference_loss)
