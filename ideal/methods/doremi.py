"""DoReMi (Xie et al. 2023): weigh up the domains in which a proxy is still behind a reference model.

The reference model is Joint SFT; the proxy starts from θ₀. At each step, of each domain k,

    excess_k = mean over its supervised tokens of max(ℓ_proxy − ℓ_reference, 0)
    α ← softmax(log α + η·excess),    α ← (1−ε)α + ε/K

and the proxy steps along the gradient of Σ_k α_k · (mean loss of domain k). The result is the mean of α over steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from ideal.costs import FORWARD, TRAINING
from ideal.data.batches import Item, batches
from ideal.data.examples import ExampleSet
from ideal.methods.problem import Problem, Stages
from ideal.methods.proxy import Stepped, items, moved, per_token, steps, tokens
from ideal.model.base import supervised_counts, supervised_logits, token_losses
from ideal.training.trainer import Trainer


def choose(problem: Problem, stages: Stages) -> dict[str, int]:
    """The mixture whose tokens are divided as α."""
    return problem.mixture_of_tokens(stages.doremi(stages.trained(problem.volumes)))


def weights(
    proxy: Trainer,
    reference: nn.Module,
    pools: Mapping[str, ExampleSet],
    total: int,
    seed: int,
    rate: float,
    smoothing: float,
) -> Iterator[Stepped]:
    """What every step did.

    Args:
        proxy: at θ₀; it is trained.
        total: examples that the proxy sees in an epoch.
        rate, smoothing: η and ε.
    """
    alpha = np.full(len(pools), 1 / len(pools))
    for step, batch in steps(pools, total, proxy.config, seed):
        excesses = [excess(proxy.model, reference, part, proxy.device, proxy.batch_tokens) for part in batch]
        alpha = moved(alpha, rate * np.array(excesses), smoothing)
        proxy.accumulate(items(batch), per_token(batch, alpha))
        proxy.move(step)
        yield Stepped(alpha, (2 * FORWARD + TRAINING) * tokens(batch))  # the reference's and the proxy's losses


@torch.no_grad()
def excess(
    proxy: nn.Module, reference: nn.Module, part: Sequence[Item], device: torch.device, batch_tokens: int
) -> float:
    """Mean over supervised tokens of max(ℓ_proxy − ℓ_reference, 0), nats."""
    behind, count = 0.0, 0
    for _, batch in batches(part, batch_tokens):
        moved_batch = batch.to(device)
        losses = [token_losses(supervised_logits(model, moved_batch), moved_batch) for model in (proxy, reference)]
        behind += float((losses[0] - losses[1]).clamp(min=0).sum())
        count += int(supervised_counts(moved_batch).sum())
    return behind / count
