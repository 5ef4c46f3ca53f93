"""All layers together: what layer-by-layer solutions of a few sets become under the curvature of the whole model.

A solver that goes layer by layer gives x_s = M g_s for every set s, each layer's as if the others stood still; which M
for which set, ``ideal.influence.solvers.solutions`` says. With U = [x_1 … x_K] of all layers, H the curvature of all
tracked layers, and Λ what AdamW damps with (``ideal.influence.solvers``), the system (H + Λ) x = g is solved once more
within the span of U, which takes K × K numbers (a Galerkin projection):

    (Uᵀ H U + Uᵀ Λ U) W = Uᵀ G,        x'_s = U w_s

So the solutions are combined anew: each is as long as the whole model's curvature allows, and pays for what it does
to the other sets. As both sides of an influence lie in the span, its error is the product of theirs.

UᵀHU needs no backward pass: with logits z, softmax p, and tangents J u = ∂z/∂θ u from a forward pass,

    u_kᵀ H u_l = Σ_n weight_n Σ_t cov_p(J_nt u_k, J_nt u_l)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ideal.data.batches import IGNORED, Batch, batches
from ideal.influence.accumulate import Block
from ideal.influence.exact import Logits
from ideal.influence.table import Array
from ideal.model.base import wide

DIRECTIONS = 2.0
"""Numbers in the directions that are held at a time, in multiples of the model's; at least one direction."""

TANGENTS = 0.5
"""The same of the logits' tangents that are held at a time; at least one batch's."""


def quadratic_forms(
    model: nn.Module,
    directions: Callable[[int, int], Mapping[str, torch.Tensor]],
    count: int,
    blocks: Sequence[Block],
    batch_tokens: int,
    device: torch.device,
) -> Array:
    """[K, K] UᵀHU over a sample; parts of a sample add up.

    Directions are held as many at a time as take the room of ``DIRECTIONS`` models, and asked for again for every
    group of examples whose logits' tangents take that of ``TANGENTS``.

    Args:
        directions: (k, l) → u_k … u_(l-1) by layer, [l - k, d_out, d_in].
        count: K.
        blocks: those with weight enter.
        batch_tokens: in a forward pass, the tangents of all directions counted.
    """
    logits = Logits(model.requires_grad_(False))
    size = sum(weight.numel() for weight in model.parameters())
    step = at_once(size, sum(part.numel() for part in directions(0, 1).values()))
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    total = torch.zeros(count, count, dtype=torch.float64, device=device)
    for group in _groups(blocks, batch_tokens // count, int(TANGENTS * size / count / vocabulary)):
        rows: list[list[torch.Tensor]] = [[] for _ in group]
        for start in range(0, count, step):
            some = directions(start, min(start + step, count))
            for found, (batch, _) in zip(rows, group, strict=True):
                found.append(_centred_tangents(logits, some, batch.to(device)))
        for found, (_, weight) in zip(rows, group, strict=True):
            whole = torch.cat(found)
            total += weight * (whole @ whole.T).double()
    return np.asarray(total.cpu().numpy())


def at_once(parameters: int, tracked: int) -> int:
    """Directions over so many tracked weights that are held at a time beside a model."""
    return max(1, int(DIRECTIONS * parameters / tracked))


def _groups(blocks: Sequence[Block], batch_tokens: int, positions: int) -> Iterator[list[tuple[Batch, float]]]:
    """Batches and their weights, as many together as have so many supervised positions; at least one."""
    group: list[tuple[Batch, float]] = []
    held = 0
    for block in blocks:
        for _, batch in batches(block.items, max(1, batch_tokens)) if block.weight > 0 else ():
            size = int((batch.targets != IGNORED).sum())
            if group and held + size > positions:
                yield group
                group, held = [], 0
            group.append((batch, block.weight))
            held += size
    if group:
        yield group


def _centred_tangents(logits: Logits, directions: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """[K, s V] √p (J u − E_p J u) of s supervised positions: products of two are covariances.

    The logits themselves are computed once for all directions.
    """
    weights = {f"model.{layer}.weight": logits.model.get_parameter(f"{layer}.weight").detach() for layer in directions}
    u = {f"model.{layer}.weight": part.to(weights[f"model.{layer}.weight"]) for layer, part in directions.items()}

    def at(values: dict[str, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = functional_call(logits, values, (batch,))
        return found

    def along(one: dict[str, torch.Tensor]) -> torch.Tensor:
        found = jvp(at, (weights,), (one,))
        p, tangent = wide(found[0]).softmax(-1), wide(found[1])
        return ((tangent - (tangent * p).sum(-1, keepdim=True)) * p.sqrt()).flatten()

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found: torch.Tensor = vmap(along)(u)
        return found


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
