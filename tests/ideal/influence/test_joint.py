"""The combination of layers' solutions against the dense system that it is a projection of, in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from ideal.influence.accumulate import Block
from ideal.influence.joint import combination, damping_forms, quadratic_forms
from ideal.influence.table import Array
from tests.ideal.dense import (
    DOMAINS,
    REFERENCES,
    WEIGHTS,
    blocks,
    dense_gauss_newton,
    diagonal,
    factored,
    flat,
    lambdas,
    layer_by_layer,
    mean_gradients,
    projected,
    random_vectors,
)
from tests.ideal.made import example_set, influence, llama, run

CPU = torch.device("cpu")
DAMPING = 0.05


@pytest.fixture
def model() -> LlamaForCausalLM:
    return llama()


@pytest.mark.parametrize(("batch_tokens", "room"), [(1, 1.0), (40, 1.0), (10**6, 1.0), (40, 0.0)])
def test_forms_are_the_dense_matrixs(
    model: LlamaForCausalLM, batch_tokens: int, room: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many directions and examples are held at a time."""
    monkeypatch.setattr("ideal.influence.joint.DIRECTIONS", room)
    monkeypatch.setattr("ideal.influence.joint.TANGENTS", room)
    u = random_vectors(model, 3, 1)

    def forms(part: list[Block]) -> Array:
        return quadratic_forms(model, lambda k, end: {x: v[k:end] for x, v in u.items()}, 3, part, batch_tokens, CPU)

    found = forms(blocks())
    np.testing.assert_allclose(found, (flat(u) @ dense_gauss_newton(model) @ flat(u).T).numpy(), rtol=1e-9)
    parts = [forms(part) for part in (blocks()[:1], blocks()[1:])]
    np.testing.assert_allclose(sum(parts), found)


def gradients() -> tuple[torch.Tensor, torch.Tensor]:
    """[domains, n] and [reference sets, n] mean gradients."""
    model = llama()
    return tuple(torch.stack([mean_gradients(model, x) for x in sets]) for sets in (DOMAINS, REFERENCES))  # type: ignore[return-value]


def by_kfac(model: LlamaForCausalLM, g: torch.Tensor) -> torch.Tensor:
    """[sets, n] every set's solution, layer by layer."""
    curvature = torch.block_diag(*factored(run(model, blocks())[0], DAMPING).values())
    return torch.linalg.solve(curvature, g.T).T


@pytest.mark.parametrize("solver", ["adam", "kfac"])
def test_influence_is_the_projected_solve(model: LlamaForCausalLM, solver: str) -> None:
    """All layers together: their own blocks alone would be another answer, and so would any layer-wise solver."""
    own, h = lambdas(model), dense_gauss_newton(model)
    g, r = gradients()
    damped = h + torch.diag(diagonal(own))
    by_adam, of_kfac = torch.cat([g, r]) / diagonal(own), by_kfac(model, torch.cat([g, r]))
    mixed = torch.cat([by_adam[: len(g)], of_kfac[len(g) :]])
    u, others = (by_adam, {"mixed": mixed}) if solver == "adam" else (mixed, {"its own": of_kfac, "adam's": by_adam})
    given = {"schedule": own} if solver == "adam" else {"damping": DAMPING, "own": own}
    found = influence(model, DOMAINS, REFERENCES, WEIGHTS, solver=solver, joint=True, **given).matrix()  # type: ignore[arg-type]
    right = projected(g, r, u, damped)
    np.testing.assert_allclose(found, right, rtol=1e-6)

    blockwise = layer_by_layer(model, h)
    wrong = {
        **{f"the span of {what} solutions": projected(g, r, other, damped) for what, other in others.items()},
        "plain": influence(model, DOMAINS, REFERENCES, WEIGHTS, solver="identity").matrix(),
        "the solver alone": influence(model, DOMAINS, REFERENCES, WEIGHTS, solver=solver, **given).matrix(),  # type: ignore[arg-type]
        "layer by layer": projected(g, r, u, blockwise + torch.diag(diagonal(own))),
    }
    for what, answer in wrong.items():
        scaled = answer * (answer * right).sum() / (answer * answer).sum()
        assert np.abs(scaled - right).max() > 1e-3 * np.abs(right).max(), what


def test_resamples_spread_as_other_samples_do(model: LlamaForCausalLM) -> None:
    """Though they keep the span, which is made of the same blocks: in how far that matters is measured here."""
    own, b = lambdas(model), 8
    found, variances = [], []
    for draw in range(14):
        sets = [example_set(2 * b, 100 * (draw + 1) + number) for number in range(4)]
        table = influence(
            model, sets[:2], sets[2:], WEIGHTS, solver="kfac", joint=True, blocks=b, damping=DAMPING, own=own
        )
        found.append(table.matrix())
        variances.append(table.resampled(400, draw).var(0))
    tails = (b - 1) / (b - 3)  # the variance of Student's t, which the resamples' distances are multiplied by
    ratio = np.sqrt(np.mean(variances) / tails / np.var(found, axis=0, ddof=1).mean())
    assert 0.9 < ratio < 1.1  # 0.96; without the domains' share 0.85


def test_no_combination_is_nearer_to_the_whole_solve() -> None:
    """In the system's own norm, by which the predicted loss is off."""
    random = np.random.default_rng(1)
    matrix, u, g = random.normal(size=(9, 9)), random.normal(size=(3, 9)), random.normal(size=(3, 9))
    matrix = matrix @ matrix.T
    w, whole = combination(u @ matrix @ u.T, u @ g.T), np.linalg.solve(matrix, g.T).T

    def off(w: Array) -> Array:
        error = w.T @ u - whole
        return np.asarray(((error @ matrix) * error).sum(1))

    for _ in range(20):
        assert (off(w) < off(w + 0.1 * random.normal(size=w.shape))).all()


def test_solutions_that_are_right_stay() -> None:
    random = np.random.default_rng(0)
    matrix = random.normal(size=(9, 9))
    matrix = matrix @ matrix.T + np.eye(9)
    g = random.normal(size=(4, 9))
    u = g @ np.linalg.inv(matrix)
    np.testing.assert_allclose(combination(u @ matrix @ u.T, u @ g.T), np.eye(4), atol=1e-9)
    np.testing.assert_allclose(combination(u @ (10 * matrix) @ u.T, u @ g.T), np.eye(4) / 10, atol=1e-9)


def test_scales_do_not_matter_and_a_set_that_is_there_twice_neither() -> None:
    random = np.random.default_rng(0)
    matrix, u, g = np.diag(random.uniform(0.1, 9, 9)), random.normal(size=(3, 9)), random.normal(size=(3, 9))
    right = combination(u @ matrix @ u.T, u @ g.T).T @ u
    scaled = u * np.array([[1e-6], [1.0], [1e5]])
    np.testing.assert_allclose(combination(scaled @ matrix @ scaled.T, scaled @ g.T).T @ scaled, right, rtol=1e-6)
    twice, again = u[[0, 1, 2, 0]], g[[0, 1, 2, 0]]
    found = combination(twice @ matrix @ twice.T, twice @ again.T).T @ twice
    np.testing.assert_allclose(found, right[[0, 1, 2, 0]], rtol=1e-6, atol=1e-9)


def test_the_optimisers_damping_is_a_form() -> None:
    random = torch.Generator().manual_seed(0)
    u = torch.randn(3, 4, 5, generator=random, dtype=torch.float64)
    damping = torch.rand(4, 5, generator=random, dtype=torch.float64)
    right = u.flatten(1) @ torch.diag(damping.flatten()) @ u.flatten(1).T
    np.testing.assert_allclose(damping_forms(u, damping), right.numpy())
