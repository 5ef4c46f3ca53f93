"""K-FAC and EK-FAC: the curvature of a linear layer by two small factors, and its damped inverse.

For a layer with input a [d_in] and gradient g [d_out] of its output, over the positions that carry gradient,

    A = E[a aᵀ]  [d_in, d_in],      S = E[g gᵀ]  [d_out, d_out],      F ≈ S ⊗ A        (Martens & Grosse 2015)

K-FAC divides its damping between the factors (section 6.3 there). For G [d_out, d_in], with λ_S and λ_A the factors'
eigenvalues, whose means are those of the diagonals,

    (F + λ)⁻¹ G ≈ (S + √c · mean(λ_S))⁻¹ G (A + √c · mean(λ_A))⁻¹,

which needs no eigenvectors: Cholesky's decomposition takes a thirtieth of their multiplications.

EK-FAC (George et al. 2018) keeps the factors' eigenvectors Q_S and Q_A, in columns, as ``eigh`` gives them, and not
their eigenvalues: with those that F has in this basis, Λ [d_out, d_in] (``ideal.influence.ekfac``),

    (F + λ)⁻¹ G ≈ Q_S [ (Q_Sᵀ G Q_A) / (Λ + λ) ] Q_Aᵀ,      λ = c · mean(Λ).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

RIDGES = (0.0, 1e-6, 1e-4, 1e-2)
"""Tried one after the other on a factor's diagonal until it can be decomposed, as multiples of its mean."""
NO_CURVATURE = "has no curvature: no gradient reaches it"


@dataclass(frozen=True)
class Eigen:
    """A layer's curvature in its eigenbasis.

    Attributes:
        q_a: [d_in, d_in] eigenvectors of A in columns.
        q_s: [d_out, d_out] eigenvectors of S in columns.
        curvature: [d_out, d_in] Λ, damping included.
        condition: largest by smallest eigenvalue before damping.
        ridge: what a factor needed on its diagonal to be decomposed, as a multiple of its mean eigenvalue; 0 is well.
    """

    q_a: torch.Tensor
    q_s: torch.Tensor
    curvature: torch.Tensor
    condition: float
    ridge: float = 0.0

    def rotate(self, gradient: torch.Tensor) -> torch.Tensor:
        """[..., d_out, d_in] Q_Sᵀ G Q_A."""
        return self.q_s.T @ gradient @ self.q_a

    def solve(self, gradient: torch.Tensor) -> torch.Tensor:
        """[..., d_out, d_in] (F + λ)⁻¹ G."""
        return self.q_s @ (self.rotate(gradient) / self.curvature) @ self.q_a.T


@dataclass(frozen=True)
class Eigenbasis:
    """One factor's eigenvalues [d], ascending and not below 0, and its eigenvectors [d, d] in columns; fp64.

    ``ridge``: what its diagonal needed, as a multiple of the mean eigenvalue.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    ridge: float = 0.0


def eigenbasis(factor: torch.Tensor) -> Eigenbasis:
    """Decompose a factor [d, d] in fp64.

    One that doesn't converge is tried again with a little of the mean eigenvalue on the diagonal, more each time.

    Raises:
        FloatingPointError: the factor isn't finite, or no try converges.
    """
    (values, vectors), ridge = _decomposed(factor, 0.0, torch.linalg.eigh, "eigen-decomposition")
    return Eigenbasis(values.clamp(min=0), vectors, ridge)


def curvature(
    a: Eigenbasis,
    s: Eigenbasis,
    eigenvalues: torch.Tensor,
    damping: float,
    dtype: torch.dtype,
    *,
    absolute: float | None = None,
) -> Eigen:
    """A layer's damped curvature.

    Args:
        eigenvalues: [d_out, d_in] Λ.
        damping: λ as a multiple of the layer's mean eigenvalue.
        dtype: of the result.
        absolute: λ itself, in place of ``damping``.

    Raises:
        FloatingPointError: there is no curvature: no gradient reaches the layer.
    """
    eigenvalues = eigenvalues.to(s.values)
    mean = float(eigenvalues.mean())
    if not mean > 0:
        raise FloatingPointError(NO_CURVATURE)
    condition = float(eigenvalues.max() / eigenvalues.min().clamp(min=1e-300))
    lam = damping * mean if absolute is None else absolute
    return Eigen(
        a.vectors.to(dtype), s.vectors.to(dtype), (eigenvalues + lam).to(dtype), condition, max(a.ridge, s.ridge)
    )


@dataclass(frozen=True)
class Inverse:
    """One factor's damped inverse [d, d] in fp64.

    ``condition``: of the damped factor, in the 1-norm; ``ridge`` as in ``Eigenbasis``.
    """

    matrix: torch.Tensor
    condition: float
    ridge: float = 0.0


def inverse(factor: torch.Tensor, damping: float) -> Inverse:
    """(X + √damping · mean eigenvalue)⁻¹ of a factor X [d, d].

    Raises:
        FloatingPointError: it isn't finite, is 0, or can't be decomposed.
    """
    shift = damping**0.5 * float(factor.diagonal().double().mean())
    if shift == 0:
        raise FloatingPointError(NO_CURVATURE)
    root, ridge = _decomposed(factor, shift, torch.linalg.cholesky, "Cholesky decomposition")
    matrix = torch.cholesky_inverse(root)
    largest = float(factor.abs().sum(0).max()) + shift  # the diagonal isn't negative
    return Inverse(matrix, largest * float(torch.linalg.norm(matrix, 1)), ridge)


class Divided:
    """scale · S ⊗ A with the damping divided between both; ``scale``: positions per supervised token.

    Attributes:
        condition: an upper bound.
    """

    def __init__(self, a: Inverse, s: Inverse, scale: float, dtype: torch.dtype) -> None:
        self.a, self.s = a.matrix.to(dtype), (s.matrix / scale).to(dtype)
        self.condition, self.ridge = a.condition * s.condition, max(a.ridge, s.ridge)

    def solve(self, gradient: torch.Tensor) -> torch.Tensor:
        """[..., d_out, d_in] the damped inverse of the curvature times G."""
        return self.s @ gradient @ self.a


def _decomposed(
    factor: torch.Tensor, shift: float, decompose: Callable[[torch.Tensor], T], what: str
) -> tuple[T, float]:
    """(decomposition of the shifted factor in fp64, the first ridge with which there is one)."""
    if not torch.isfinite(factor).all():
        raise FloatingPointError("isn't finite")
    mean = float(factor.diagonal().double().mean())
    for ridge in RIDGES:
        wide = factor.double().clone()
        wide.diagonal().add_(shift + ridge * mean)
        try:
            return decompose(wide), ridge
        except RuntimeError:
            continue
    raise FloatingPointError(f"has no {what}, even with {RIDGES[-1]:g} of its mean eigenvalue added")
