"""DOGE (Fan et al. 2024): weigh up the domains whose gradients point where the reference sets' does.

A proxy starts from θ₀. Each step takes one clipped gradient g_k of each domain and one, g, of the reference sets:

    s_k = lr · ⟨g_k, g⟩ / mean_k‖g_k‖, at least 0 and at most 5·lr
    α ← softmax(log α + s/μ)

and the proxy moves along Σ_k α_k g_k. The result is the mean of α over steps. μ is given as a multiple of SFT's peak
learning rate: with the paper's own, made for pre-training, fine-tuning's small rates would never move the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from ideal.batches import Item
from ideal.examples import ExampleSet
from ideal.methods.problem import Array, Problem, Stages
from ideal.methods.proxy import Stepped, items, moved, per_token, steps, tokens
from ideal.training import Trainer

LARGEST = 5.0
"""Of a score, in learning rates."""


def choose(problem: Problem, stages: Stages) -> dict[str, int]:
    """The mixture whose tokens are divided as α."""
    return problem.mixture_of_tokens(stages.doge())


def weights(
    proxy: Trainer,
    pools: Mapping[str, ExampleSet],
    references: Mapping[str, ExampleSet],
    total: int,
    seed: int,
    step_size: float,
) -> Iterator[Stepped]:
    """What every step did.

    Args:
        proxy: at θ₀; it is trained.
        total: examples that the proxy sees in an epoch.
        step_size: SFT's peak learning rate / μ.
    """
    alpha = np.full(len(pools), 1 / len(pools))
    mu = proxy.config.learning_rate / step_size
    drawn = (steps(sets, total, proxy.config, seed) for sets in (pools, references))
    for (step, batch), (_, held_out) in zip(*drawn, strict=True):
        gradients = torch.stack([gradient(proxy, part) for part in batch])
        wanted = gradient(proxy, items(held_out), per_token(held_out, np.ones(len(held_out))))
        alpha = moved(alpha, scores(gradients, wanted, step.rate) / mu)
        along = torch.tensor(alpha, dtype=gradients.dtype, device=gradients.device) @ gradients
        flats = list(proxy.flats.values())
        for flat, part in zip(flats, torch.split(along, [flat.gradient.numel() for flat in flats]), strict=True):
            flat.gradient.copy_(part)
        proxy.move(step)
        yield Stepped(alpha, tokens(batch) + tokens(held_out))


def gradient(proxy: Trainer, batch: Sequence[Item], weights: list[float] | None = None) -> torch.Tensor:
    """[n] gradient of the mean loss, clipped as SFT's is."""
    proxy.accumulate(list(batch), weights)
    flat = torch.cat([flat.gradient for flat in proxy.flats.values()])
    return flat * min(1.0, proxy.config.clip_norm / (float(flat.norm()) + 1e-6))


def scores(gradients: torch.Tensor, wanted: torch.Tensor, rate: float) -> Array:
    """[M] s.

    Args:
        gradients: [M, n] of the domains.
        wanted: [n] of the reference sets.
        rate: lr of this step.
    """
    found = rate * (gradients @ wanted) / (gradients.norm(dim=1).mean() + 1e-6)
    return np.asarray(found.clamp(0, LARGEST * rate).double().cpu().numpy())
