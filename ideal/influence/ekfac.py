"""EK-FAC: K-FAC's eigenbasis with the right eigenvalues (George et al. 2018).

Within the basis Q_S ⊗ Q_A the diagonal matrix that is nearest to the Fisher (in Frobenius norm) holds the mean
squares of the gradient's own coordinates,

    Λ_oi = E[(Q_Sᵀ G Q_A)²_oi],      G = Σ_t g_t a_tᵀ of **one example** with labels drawn from the model,

where K-FAC has λ_S λ_Aᵀ. The square is of each example's gradient, never of a batch's. This takes a second pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ideal.data.batches import batches
from ideal.influence.accumulate import Block, output_gradients_of, sampled_loss
from ideal.influence.layers import input_group, record
from ideal.model.base import summed_loss, supervised_logits, wide

Bases = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""(Q_S [d_out, d_out], Q_A [d_in, d_in]) by layer."""
CHUNK = 2**24
"""Numbers of per-example gradients held at once: 64 MB."""


def squared_gradients(
    model: nn.Module,
    bases: Bases,
    blocks: Sequence[Block],
    *,
    fisher: str,
    seed: int,
    batch_tokens: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Pass over the blocks once more.

    Args:
        bases: eigenvectors of the tracked layers.
        fisher: `sampled` or `empirical`, with the same labels as in the first pass.

    Returns:
        [d_out, d_in] Σ weight · (example's rotated gradient)² by layer: once all blocks are in, the eigenvalues of
        the mixture's mean loss per supervised token.
    """
    layers = list(bases)
    found = {
        layer: torch.zeros(len(q_s), len(q_a), device=device, dtype=q_s.dtype) for layer, (q_s, q_a) in bases.items()
    }
    with record(model, layers) as recorder:
        for block in blocks:
            if not block.weight > 0:
                continue
            for members, batch in batches(block.items, batch_tokens):
                moved = batch.to(device)
                logits = supervised_logits(model, moved)
                sampled = fisher == "sampled"
                loss = sampled_loss(logits, moved, block, members, seed) if sampled else summed_loss(logits, moved)
                gradients = output_gradients_of(dict(recorder.outputs), layers, loss, keep=False)
                keep = moved.mask[..., None]
                rotated: dict[str, torch.Tensor] = {}
                for layer, (q_s, q_a) in bases.items():
                    group = input_group(layer)
                    if group not in rotated:
                        rotated = {group: (wide(recorder.inputs[group]) * keep) @ q_a}
                    g = (wide(gradients[layer]) * keep) @ q_s
                    _add_squares(found[layer], g, rotated[group], block.weight)
    return found


def _add_squares(total: torch.Tensor, g: torch.Tensor, a: torch.Tensor, weight: float) -> None:
    """Σ_n weight · (Σ_t g_nt a_ntᵀ)², a few examples at a time."""
    step = max(1, CHUNK // total.numel())
    for start in range(0, len(g), step):
        part = slice(start, start + step)
        gradients = torch.bmm(g[part].transpose(1, 2), a[part])
        total.add_(gradients.square_().sum(0), alpha=weight)
