"""K-FAC: the curvature of a linear layer as a Kronecker product, and its damped inverse.

For a layer with input a [d_in] and gradient g [d_out] of its output, over the positions that carry gradient,

    A = E[a aᵀ]  [d_in, d_in],      S = E[g gᵀ]  [d_out, d_out],      F ≈ S ⊗ A        (Martens & Grosse 2015)

with S = Q_S Λ_S Q_Sᵀ and A = Q_A Λ_A Q_Aᵀ, eigenvectors in columns, as ``eigh`` gives them. For G [d_out, d_in],

    (F + λ)⁻¹ G = Q_S [ (Q_Sᵀ G Q_A) / (λ_S λ_Aᵀ + λ) ] Q_Aᵀ,      λ = c · mean eigenvalue = c · mean(λ_S) · mean(λ_A).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

RIDGES = (0.0, 1e-6, 1e-4, 1e-2)
"""Tried one after the other on a factor's diagonal until it can be decomposed."""


@dataclass(frozen=True)
class Eigen:
    """A layer's curvature in its eigenbasis.

    Attributes:
        q_a: [d_in, d_in] eigenvectors of A in columns.
        q_s: [d_out, d_out] eigenvectors of S in columns.
        curvature: [d_out, d_in] eigenvalues of scale · S ⊗ A, damping included.
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

    A decomposition that doesn't converge is tried again with a little of the mean eigenvalue on the diagonal, more
    each time, and says so in ``repair``.

    Raises:
        FloatingPointError: the factor isn't finite, or no try converges.
    """
    if not torch.isfinite(factor).all():
        raise FloatingPointError("isn't finite")
    wide = factor.double()
    for ridge in RIDGES:
        try:
            values, vectors = torch.linalg.eigh(wide + ridge * wide.diagonal().mean() * _one(wide) if ridge else wide)
        except RuntimeError:
            continue
        return Eigenbasis(values.clamp(min=0), vectors, ridge)
    raise FloatingPointError(f"has no eigen-decomposition, even with {RIDGES[-1]:g} of its mean eigenvalue added")


def curvature(
    a: Eigenbasis,
    s: Eigenbasis,
    scale: float,
    damping: float,
    dtype: torch.dtype,
    *,
    refined: torch.Tensor | None = None,
    absolute: float | None = None,
) -> Eigen:
    """A layer's damped curvature.

    Args:
        scale: positions per supervised token; scale · S ⊗ A is the curvature of the mean loss per token.
        damping: λ as a multiple of the layer's mean eigenvalue.
        dtype: of the result.
        refined: [d_out, d_in] eigenvalues in the same basis that replace those of scale · S ⊗ A (``ekfac``).
        absolute: λ itself, in place of ``damping``.

    Raises:
        FloatingPointError: there is no curvature: no gradient reaches the layer.
    """
    eigenvalues = scale * torch.outer(s.values, a.values)
    if refined is not None:
        eigenvalues = refined.to(eigenvalues)
    mean = float(eigenvalues.mean())
    if not mean > 0:
        raise FloatingPointError("has no curvature: no gradient reaches it")
    condition = float(eigenvalues.max() / eigenvalues.min().clamp(min=1e-300))
    lam = damping * mean if absolute is None else absolute
    return Eigen(
        a.vectors.to(dtype), s.vectors.to(dtype), (eigenvalues + lam).to(dtype), condition, max(a.ridge, s.ridge)
    )


def _one(matrix: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
