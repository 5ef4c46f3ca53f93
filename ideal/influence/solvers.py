"""What a solver does to a gradient of one layer, and what it needs for that.

A solver is a matrix M; the influence of domain j on reference set r is ⟨g_r, M ḡ_j⟩. M is applied to the sum gradient
of each *set*, and never to the many blocks: their products follow from that (``ideal.influence.products``).

| solver | M | passes |
| --- | --- | --- |
| `identity` | 1 | the gradients |
| `adam` | Λ⁻¹, what the optimiser itself does with a gradient | the gradients |
| `kfac` | (S + √c s̄)⁻¹ ⊗ (A + √c ā)⁻¹ | gradients and factors, at once |
| `ekfac` | the factors' eigenvectors with their right eigenvalues | one more |
| `exact` | (H + λ)⁻¹, all tracked layers together | one for each step of conjugate gradients and reference set |

Training with AdamW for T steps moves a weight along a constant gradient G by Σ_t η_t κ_t · G/(√v̂ + ε), where clipping
leaves κ_t of the gradient. So Λ = (√v̂ + ε)/Σ_t η_t κ_t is the damping that a training run has by itself: (H + Λ)⁻¹ G
is where the run ends that follows G from θ within a quadratic (a proximal step), Λ⁻¹ G where H is small against Λ, H⁻¹
G where it is large. With ``damping: schedule`` `exact` takes Λ as it is; `kfac` and `ekfac`, which need one number,
take a layer's harmonic mean of it.

All but `exact` go layer by layer. With ``joint`` their solutions are combined anew under the curvature of all layers
together and Λ (``ideal.influence.joint``), which takes forward passes over a few examples. What is combined are the
solver's solutions for the reference sets and Λ⁻¹ḡ_j for the domains: so their span knows what the curvature makes of a
gradient and what the optimiser does, which the factors don't know of, for no more directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ideal.config.config import InfluenceConfig
from ideal.influence.accumulate import FactorSums
from ideal.influence.kfac import Divided, Eigen, Eigenbasis, Inverse, curvature, eigenbasis, inverse
from ideal.influence.layers import input_group

FACTORED = ("kfac", "ekfac")


class LayerSolver(Protocol):
    """M of one layer; all solvers but `exact`, which couples them."""

    def solve(self, gradient: torch.Tensor) -> torch.Tensor:
        """[..., d_out, d_in] M G."""


class Plain:
    """M = 1."""

    def solve(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


@dataclass(frozen=True)
class Diagonal:
    """M = 1/Λ with Λ [d_out, d_in] positive."""

    damping: torch.Tensor

    def solve(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient / self.damping


def layer_damping(damping: torch.Tensor) -> float:
    """The one λ that moves a layer as far as its Λ does, in the mean over its weights."""
    return float(1 / (1 / damping.double()).mean())


def coupled(solver: str, settings: InfluenceConfig) -> bool:
    """Whether the layers' solutions are combined anew: `exact` has coupled them already."""
    return settings.joint and solver != "exact"


def solutions(solver: LayerSolver, gradients: torch.Tensor, domains: int, own: torch.Tensor | None) -> torch.Tensor:
    """[sets, d_out, d_in] what a layer's solver, or for domains the optimiser's diagonal, makes of each set's.

    Args:
        gradients: [sets, d_out, d_in], those of the domains first.
        own: [d_out, d_in] Λ of the layer, where solutions are combined anew; None: they aren't.
    """
    if own is None:
        return solver.solve(gradients)
    return torch.cat([Diagonal(own).solve(gradients[:domains]), solver.solve(gradients[domains:])])


def needs_factors(solver: str, settings: InfluenceConfig) -> bool:
    """Whether a solver asks for S and A: `exact` for their traces alone, where its damping is relative to them."""
    return solver in FACTORED or (solver == "exact" and settings.damping != "schedule")


def layer_bases(
    sums: FactorSums, layer: str, known: dict[str, Eigenbasis] | None = None
) -> tuple[Eigenbasis, Eigenbasis]:
    """(of A, of S) of a layer.

    Args:
        known: the last layer's basis of A by input group: layers that share an input share the decomposition.

    Raises:
        FloatingPointError: one of them can't be decomposed; the layer is named.
    """
    known, group = {} if known is None else known, input_group(layer)
    try:
        if group not in known:
            known.clear()
            known[group] = eigenbasis(sums.a[group] / sums.positions)
        return known[group], eigenbasis(sums.s[layer] / sums.positions)
    except FloatingPointError as error:
        raise FloatingPointError(f"influence: layer {layer} {error}") from None


def layer_inverse(
    sums: FactorSums,
    layer: str,
    settings: InfluenceConfig,
    own: torch.Tensor | None,
    known: dict[tuple[str, float], Inverse],
) -> Divided:
    """A layer's K-FAC inverse with its damping divided between the factors.

    Args:
        known: the last layer's inverse of A by input group and damping.

    Raises:
        FloatingPointError: there is none; the layer is named.
    """
    group, dtype = input_group(layer), sums.s[layer].dtype
    a, s = sums.a[group] / sums.positions, sums.s[layer] / sums.positions
    try:
        if settings.damping == "schedule":
            assert own is not None, "the schedule's damping is the optimiser's"
            mean = sums.positions * float(a.diagonal().mean() * s.diagonal().mean())
            damping = layer_damping(own) / mean if mean else 0.0
        else:
            damping = settings.damping
        if (group, damping) not in known:
            known.clear()
            known[group, damping] = inverse(a, damping)
        return Divided(known[group, damping], inverse(s, damping), sums.positions, dtype)
    except FloatingPointError as error:
        raise FloatingPointError(f"influence: layer {layer} {error}") from None


def layer_curvature(
    layer: str,
    a: Eigenbasis,
    s: Eigenbasis,
    eigenvalues: torch.Tensor,
    settings: InfluenceConfig,
    own: torch.Tensor | None,
    dtype: torch.dtype,
) -> Eigen:
    """A layer's damped curvature of `ekfac` as the settings ask for it.

    Args:
        eigenvalues: [d_out, d_in] in the bases of A and S, of the second pass.

    Raises:
        FloatingPointError: there is none; the layer is named.
    """
    scheduled = settings.damping == "schedule"
    try:
        return curvature(
            a,
            s,
            eigenvalues,
            0.0 if settings.damping == "schedule" else settings.damping,
            dtype,
            absolute=layer_damping(own) if scheduled and own is not None else None,
        )
    except FloatingPointError as error:
        raise FloatingPointError(f"influence: layer {layer} {error}") from None


def exact_damping(
    sums: FactorSums, layers: Sequence[str], settings: InfluenceConfig, own: Callable[[str], torch.Tensor]
) -> dict[str, torch.Tensor | float]:
    """Λ of `exact`: AdamW's, or a multiple of each layer's mean eigenvalue, which its factors' traces give.

    Args:
        own: a layer's AdamW's Λ.
    """
    if settings.damping == "schedule":
        return {layer: own(layer) for layer in layers}
    means = {
        layer: float(sums.a[input_group(layer)].diagonal().mean() * sums.s[layer].diagonal().mean() / sums.positions)
        for layer in layers
    }
    return {layer: settings.damping * mean for layer, mean in means.items()}
