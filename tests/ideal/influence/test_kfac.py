"""The damped inverse of a Kronecker product, at a damping so small that a wrong one shows."""

from __future__ import annotations

import pytest
import torch

from ideal.influence.kfac import RIDGES, Divided, Eigen, curvature, eigenbasis, inverse

D_OUT, D_IN, SCALE = 5, 7, 2.5
BOUND = 1e-9
"""Relative error allowed to the right answer; every wrong one misses it by far more."""


def factor(d: int, seed: int) -> torch.Tensor:
    """A covariance with eigenvalues over two orders of magnitude, as real factors have."""
    random = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=random, dtype=torch.float64))
    return (q * torch.logspace(-2, 0, d, dtype=torch.float64)) @ q.T


A, S = factor(D_IN, 1), factor(D_OUT, 2)
G = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
F = SCALE * torch.kron(S, A)


def solved(damping: float, a: torch.Tensor = A, s: torch.Tensor = S, scale: float = SCALE) -> Eigen:
    """Of scale · S ⊗ A itself, whose eigenvalues are the factors' products."""
    of_a, of_s = eigenbasis(a), eigenbasis(s)
    return curvature(of_a, of_s, scale * torch.outer(of_s.values, of_a.values), damping, torch.float64)


def divided(damping: float) -> Divided:
    return Divided(inverse(A, damping), inverse(S, damping), SCALE, torch.float64)


def dense(damping: float, gradient: torch.Tensor = G) -> torch.Tensor:
    damped = F + damping * torch.diag(F).mean() * torch.eye(len(F), dtype=torch.float64)
    return torch.linalg.solve(damped, gradient.flatten()).view_as(gradient)


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Relative error at the best common scale: a wrong unit alone doesn't count as wrong."""
    found = found * (found * right).sum() / (found * found).sum()
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_solve_is_the_dense_inverse_and_nothing_else_is(damping: float) -> None:
    eigen, right = solved(damping), dense(damping)
    torch.testing.assert_close(eigen.solve(G), right, rtol=BOUND, atol=BOUND)
    q_s, q_a, values = eigen.q_s, eigen.q_a, eigen.curvature
    undamped = values - damping * torch.diag(F).mean()
    wrong = {
        "identity": G,
        "rotated with Q G Qᵀ": q_s.T @ ((q_s @ G @ q_a.T) / values) @ q_a,
        "H instead of its inverse": q_s @ (eigen.rotate(G) * values) @ q_a.T,
        "no damping": q_s @ (eigen.rotate(G) / undamped) @ q_a.T,
        "A and S damped one by one": divided(damping).solve(G),
    }
    for what, answer in wrong.items():
        assert error(answer, right) > 0.02, what


def test_a_large_damping_would_hide_them() -> None:
    """Why the tests above are at a small one."""
    assert error(G, dense(1000.0)) < 0.02


def test_damping_is_relative_to_the_layers_mean_eigenvalue() -> None:
    larger = solved(0.1, 9 * A, 4 * S)
    torch.testing.assert_close(36 * larger.solve(G), solved(0.1).solve(G))
    values = torch.linalg.eigvalsh(F)
    assert solved(0.1).condition == pytest.approx(float(values[-1] / values[0]))
    torch.testing.assert_close(solved(0.1).curvature.flatten().sort().values, values + 0.1 * values.mean())


@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_divided_damping_is_the_dense_inverse_of_both_damped_factors(damping: float) -> None:
    """Its share of each is the root of λ, so that a matrix of equal eigenvalues meets λ itself, between the lines."""
    damped = [x + damping**0.5 * torch.diag(x).mean() * torch.eye(len(x), dtype=torch.float64) for x in (S, A)]
    right = torch.linalg.solve(SCALE * torch.kron(*damped), G.flatten()).view_as(G)
    found = divided(damping)
    torch.testing.assert_close(found.solve(G), right, rtol=BOUND, atol=BOUND)
    for what, answer in {"identity": G, "λ on the product": dense(damping)}.items():
        assert error(answer, right) > 0.02, what
    left = [torch.linalg.cond(x, 1) for x in damped]
    assert found.condition == pytest.approx(float(left[0] * left[1]))


def test_divided_damping_survives_a_singular_factor_and_says_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    singular = torch.diag(torch.tensor([0.0, 1.0]).double())
    assert inverse(singular, 0.01).matrix[0, 0] == pytest.approx(1 / 0.05)
    real, tries = torch.linalg.cholesky, []

    def stubborn(matrix: torch.Tensor) -> torch.Tensor:
        tries.append(matrix)
        if len(tries) < 3:
            raise torch.linalg.LinAlgError("not positive-definite")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky", stubborn)
    assert inverse(singular, 0.01).ridge == RIDGES[2]
    for broken in (torch.full((2, 2), float("nan")), torch.zeros(2, 2)):
        with pytest.raises(FloatingPointError, match=r"finite|no gradient"):
            inverse(broken, 0.1)


def test_exact_for_one_position_of_a_linear_model() -> None:
    """There the Fisher is E_y[(g gᵀ)] ⊗ a aᵀ: K-FAC approximates nothing."""
    random = torch.Generator().manual_seed(5)
    w = torch.randn(D_OUT, D_IN, generator=random, dtype=torch.float64, requires_grad=True)
    a = torch.randn(D_IN, generator=random, dtype=torch.float64)
    p = (w @ a).detach().softmax(0)
    fisher, s = torch.zeros(D_OUT * D_IN, D_OUT * D_IN, dtype=torch.float64), torch.zeros(D_OUT, D_OUT).double()
    for label in range(D_OUT):
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(w @ a, torch.tensor(label)), w)
        fisher += p[label] * torch.outer(gradient.flatten(), gradient.flatten())
        g = p - torch.eye(D_OUT, dtype=torch.float64)[label]
        s += p[label] * torch.outer(g, g)
    eigen = solved(0.05, torch.outer(a, a), s, 1.0)
    damped = fisher + 0.05 * torch.diag(fisher).mean() * torch.eye(len(fisher), dtype=torch.float64)
    expected = torch.linalg.solve(damped, G.flatten()).view_as(G)
    torch.testing.assert_close(eigen.solve(G), expected, rtol=1e-8, atol=1e-8)


def test_factors_are_decomposed_in_fp64() -> None:
    """The small eigenvalues of an fp32 factor decide the inverse, and an fp32 decomposition loses them."""
    wide = factor(40, 6) @ factor(40, 6)
    values = eigenbasis(wide.float()).values
    assert values.dtype == torch.float64
    exact = torch.linalg.eigvalsh(wide.float().double())
    torch.testing.assert_close(values, exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_refused(broken: float) -> None:
    with pytest.raises(FloatingPointError, match="finite"):
        eigenbasis(torch.full((2, 2), broken))


def test_a_layer_without_curvature_is_refused() -> None:
    with pytest.raises(FloatingPointError, match="no gradient"):
        solved(0.1, s=torch.zeros(D_OUT, D_OUT))
