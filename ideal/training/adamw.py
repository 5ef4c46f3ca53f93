"""AdamW over one flat fp32 vector for all parameters, and how firmly it holds each weight.

Forward and backward run in ``precision``; master weights, gradient sums and AdamW's moments are fp32, each one flat
vector for all parameters. That makes the sum over workers, the norm for clipping and the step one operation each,
lets workers differ in their number of micro-batches, and never adds up gradients in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ideal.config.config import SftConfig


def optimizer_of(matrices: list[nn.Parameter], vectors: list[nn.Parameter], config: SftConfig) -> torch.optim.AdamW:
    """AdamW, with weight decay for matrices alone."""
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def update(optimizer: torch.optim.AdamW, step: int, rate: float, norm: torch.Tensor, clip_norm: float) -> float:
    """Move the weights along the clipped gradients that are there.

    Args:
        step: its number, for the error.
        norm: the gradients', before they were clipped.
        clip_norm: what they were clipped to.

    Returns:
        η_t κ_t, the rate at which the step took up its gradient, with κ_t = min(1, clip_norm / norm).

    Raises:
        FloatingPointError: the gradient's norm isn't finite; the weights are as before.
    """
    if not torch.isfinite(norm):
        raise FloatingPointError(f"SFT: the gradient of step {step} isn't finite; lower sft.learning_rate")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return rate * min(1.0, clip_norm / max(float(norm), 1e-12))


def stiffness(state: Mapping[str, torch.Tensor], group: Mapping[str, Any], rates: float) -> torch.Tensor:
    """Λ = (√v̂ + ε) / Σ_t η_t κ_t: how firmly AdamW held each weight so far.

    A constant gradient G, of which each step sees κ_t G after clipping, moves a weight by G/Λ over the run (Kingma &
    Ba 2015, with v̂ held at its last value). v̂ is of clipped gradients, so a sum of plain rates would make Λ too small.

    Args:
        state, group: AdamW's, of one tensor.
        rates: Σ_t η_t κ_t, what ``update`` returned.
    """
    corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
    damping: torch.Tensor = (corrected.sqrt() + group["eps"]) / rates
    return damping


class Flat:
    """Parameters as one fp32 vector: the master weights, and the sum of gradients.

    Backward's gradients are added to the sum as soon as they are made, and freed.

    Attributes:
        master: [n] fp32 weights.
        gradient: [n] fp32, ``master.grad``.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.master = nn.Parameter(torch.cat([p.detach().flatten().float() for p in parameters]))
        self.gradient = self.master.grad = torch.zeros_like(self.master)
        sizes = [p.numel() for p in parameters]
        self._places = list(zip(parameters, torch.split(self.master.detach(), sizes), strict=True))
        for parameter, place in zip(parameters, torch.split(self.gradient, sizes), strict=True):
            parameter.register_post_accumulate_grad_hook(_add_to(place.view_as(parameter)))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the master weights to the model's own precision."""
        for parameter, place in self._places:
            parameter.copy_(place.view_as(parameter))


def _add_to(place: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        place.add_(parameter.grad)
        parameter.grad = None

    return add
