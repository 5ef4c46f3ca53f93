"""DOGE (Fan et al. 2024): weigh up the domains whose gradients point where the reference sets' do.

A proxy starts from θ₀. Each step takes a gradient g_k of each domain and g_r of each reference set, every one clipped:

    s_k = lr · ⟨g_k, Σ_r g_r⟩ / mean_k‖g_k‖, at least 0 and at most 5·lr
    α ← softmax(log α + s/μ)

and the proxy moves along Σ_k α_k g_k. The result is the mean of α over steps. The targets' gradients are summed, as in
the authors' code, and not averaged; with ``objective: micro`` each counts by its tokens, R in all. Reference sets are
apart from the domains, so none is left out of the sum, as the code does where the targets are the domains themselves.

μ follows from the drive Σ lr/μ that the whole run has, for which the code's settings for targets apart give 60 (10,000
steps of 3e-4 in the mean, μ 0.05): a μ made for pre-training would never move fine-tuning's few, small steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from ideal.costs import TRAINING
from ideal.data.batches import Item
from ideal.data.examples import ExampleSet
from ideal.methods.problem import Array, Problem, Stages
from ideal.methods.proxy import Stepped, moved, rates, steps, tokens
from ideal.training.trainer import Trainer

LARGEST = 5.0
"""Of a score, in learning rates."""


def choose(problem: Problem, stages: Stages) -> dict[str, int]:
    """The mixture whose tokens are divided as α."""
    return problem.mixture_of_tokens(stages.doge())


def weights(
    proxy: Trainer,
    pools: Mapping[str, ExampleSet],
    references: Mapping[str, ExampleSet],
    wanted: Array,
    total: int,
    seed: int,
    drive: float,
) -> Iterator[Stepped]:
    """What every step did.

    Args:
        proxy: at θ₀; it is trained.
        wanted: [R] of each reference set in what is minimised; they sum to 1.
        total: examples that the proxy sees in an epoch.
        drive: Σ lr/μ over all steps.
    """
    alpha = np.full(len(pools), 1 / len(pools))
    mu = sum(rates(total, proxy.config)) / drive
    drawn = (steps(sets, total, proxy.config, seed) for sets in (pools, references))
    for (step, batch), (_, held_out) in zip(*drawn, strict=True):
        gradients = torch.stack([gradient(proxy, part) for part in batch])
        target = torch.zeros_like(gradients[0])
        for weight, part in zip(wanted * len(wanted), held_out, strict=True):
            target += float(weight) * gradient(proxy, part)
        alpha = moved(alpha, scores(gradients, target, step.rate) / mu)
        along = torch.tensor(alpha, dtype=gradients.dtype, device=gradients.device) @ gradients
        flats = list(proxy.flats.values())
        for flat, part in zip(flats, torch.split(along, [flat.gradient.numel() for flat in flats]), strict=True):
            flat.gradient.copy_(part)
        proxy.move(step)
        yield Stepped(alpha, TRAINING * (tokens(batch) + tokens(held_out)))


def gradient(proxy: Trainer, batch: Sequence[Item]) -> torch.Tensor:
    """[n] gradient of the mean loss, clipped as SFT's is."""
    proxy.accumulate(list(batch))
    flat = torch.cat([flat.gradient for flat in proxy.flats.values()])
    return flat * min(1.0, proxy.config.clip_norm / (float(flat.norm()) + 1e-6))


def scores(gradients: torch.Tensor, target: torch.Tensor, rate: float) -> Array:
    """[M] s.

    Args:
        gradients: [M, n] of the domains.
        target: [n] summed over reference sets.
        rate: lr of this step.
    """
    found = rate * (gradients @ target) / (gradients.norm(dim=1).mean() + 1e-6)
    return np.asarray(found.clamp(0, LARGEST * rate).double().cpu().numpy())
