"""Merge-to-Mix (Tao et al. 2025): a weighted average of the Specific SFT models stands for training on the mixture.

One SFT for each domain; then a candidate mixture costs an evaluation and no training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from ideal.methods.problem import Array, Problem, Stages
from ideal.methods.simple import only


def choose(problem: Problem, stages: Stages) -> dict[str, int]:
    """The candidate whose average has the lowest mean reference loss."""
    models = [stages.trained(only(problem, domain)) for domain in problem.volumes]
    tried = candidates(problem)
    losses = [problem.objective(each) for each in stages.merged(models, tried.tolist())]
    return problem.mixture(tried[int(np.argmin(losses))])


def candidates(problem: Problem) -> Array:
    """[methods.merge_candidates, M] shares: D0's, equal ones, and draws around each of the two in turn."""
    count, size = problem.config.methods.merge_candidates, len(problem.volumes)
    equal = np.full(size, 1 / size)
    around = problem.around(count, "merge")
    around[1::2] = np.sqrt(around[1::2] / problem.shares)  # flatter, about equal shares
    drawn = around / around.sum(1, keepdims=True)
    return np.asarray(np.concatenate([[problem.shares, equal], drawn])[:count], float)


@torch.no_grad()
def average(model: nn.Module, models: Sequence[Mapping[str, torch.Tensor]], shares: Sequence[float]) -> None:
    """Set a model's parameters to Σ_k shares_k · (those of trained models, by name), summed in fp32."""
    for name, parameter in model.named_parameters():
        parts = [share * weights[name].float() for share, weights in zip(shares, models, strict=True)]
        parameter.copy_(torch.stack(parts).sum(0))
