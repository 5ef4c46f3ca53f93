"""The reduced system against the dense one that it is a part of, in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from ideal.curvature.accumulate import Block
from ideal.curvature.subspace import corrected, left_over, quadratic_forms
from ideal.influence import Array, InfluenceTable
from tests.ideal.dense import (
    DOMAINS,
    REFERENCES,
    WEIGHTS,
    blocks,
    dense_gauss_newton,
    flat,
    lambdas,
    mean_gradients,
    random_vectors,
)
from tests.ideal.made import MLP, influence, llama

CPU = torch.device("cpu")


@pytest.fixture
def model() -> LlamaForCausalLM:
    return llama()


@pytest.mark.parametrize("batch_tokens", [1, 40, 10**6])
def test_forms_are_the_dense_matrixs(model: LlamaForCausalLM, batch_tokens: int) -> None:
    u = random_vectors(model, 3, 1)

    def forms(part: list[Block]) -> Array:
        return quadratic_forms(model, lambda r: {x: v[r] for x, v in u.items()}, 3, part, batch_tokens, CPU)

    found = forms(blocks())
    np.testing.assert_allclose(found, (flat(u) @ dense_gauss_newton(model) @ flat(u).T).numpy(), rtol=1e-9)
    parts = [forms(part) for part in (blocks()[:1], blocks()[1:])]
    np.testing.assert_allclose(sum(parts), found)


def projected(model: LlamaForCausalLM, h: torch.Tensor, own: dict[str, torch.Tensor]) -> Array:
    """G U (Uᵀ(H + Λ)U)⁻¹ Uᵀ R with U = Λ⁻¹ R: the definition."""
    damping = torch.cat([own[f"{layer}.weight"].flatten() for layer in MLP])
    g = torch.stack([mean_gradients(model, d) for d in DOMAINS])
    r = torch.stack([mean_gradients(model, d) for d in REFERENCES])
    u = r / damping
    x = torch.linalg.solve(u @ (h + torch.diag(damping)) @ u.T, u @ r.T)
    return np.asarray((g @ u.T @ x).numpy())


def test_influence_is_the_projected_solve(model: LlamaForCausalLM) -> None:
    """All layers together: their own blocks alone would be another answer, and so would no curvature."""
    own, h = lambdas(model), dense_gauss_newton(model)
    found = influence(model, DOMAINS, REFERENCES, WEIGHTS, solver="subspace", schedule=own).matrix()
    right = projected(model, h, own)
    np.testing.assert_allclose(found, right, rtol=1e-6)

    blockwise, start = torch.zeros_like(h), 0
    for layer in MLP:
        part = slice(start, start + own[f"{layer}.weight"].numel())
        blockwise[part, part], start = h[part, part], part.stop
    wrong = {
        "plain": influence(model, DOMAINS, REFERENCES, WEIGHTS, solver="identity").matrix(),
        "the optimiser alone": influence(model, DOMAINS, REFERENCES, WEIGHTS, solver="adam", schedule=own).matrix(),
        "layer by layer": projected(model, blockwise, own),
    }
    for what, answer in wrong.items():
        scaled = answer * (answer * right).sum() / (answer * answer).sum()
        assert np.abs(scaled - right).max() > 1e-3 * np.abs(right).max(), what


def test_without_curvature_the_optimisers_answer_is_left() -> None:
    own = np.array([[2.0, 0.5], [0.5, 1e-9]])
    np.testing.assert_allclose(left_over(np.zeros((2, 2)), own + np.diag([0, 1.0])), np.eye(2), atol=1e-12)
    steep = left_over(np.diag([98.0, 0.0]), np.diag([2.0, 3.0]))
    np.testing.assert_allclose(steep, np.diag([0.02, 1.0]))


def test_a_reference_set_that_is_there_twice_changes_nothing(model: LlamaForCausalLM) -> None:
    own = lambdas(model)
    once = influence(model, DOMAINS, REFERENCES, WEIGHTS, solver="subspace", schedule=own).matrix()
    thrice = [*DOMAINS, DOMAINS[0]]
    again = influence(model, thrice, [*REFERENCES, REFERENCES[0]], [*WEIGHTS, 0.0], solver="subspace", schedule=own)
    np.testing.assert_allclose(again.matrix()[:2, :2], once, rtol=1e-6)
    np.testing.assert_allclose(again.matrix()[:2, 2], once[:, 0], rtol=1e-6)


@pytest.fixture
def table() -> InfluenceTable:
    random = np.random.default_rng(0)
    tokens = random.integers(1, 9, (5, 4)).astype(float)
    return InfluenceTable(random.normal(size=(2, 3, 4, 2, 4)), tokens[:3], tokens[3:], np.ones(2))


def test_the_table_is_turned_and_scaled_as_its_matrix_is(table: InfluenceTable) -> None:
    w = np.array([[0.5, -0.1], [0.2, 0.8]])
    found = corrected(table, w)
    np.testing.assert_allclose(found.matrix(), table.matrix() @ w)
    np.testing.assert_allclose(found.by_layer(), table.by_layer() @ w)
    np.testing.assert_allclose(corrected(table, np.eye(2)).products, table.products)


def test_a_resample_sees_its_own_sets_blocks(table: InfluenceTable) -> None:
    """Of a reference set's column, its own part as `adam` has it, the others' only through the domains."""
    own = corrected(table, np.diag([0.5, 0.8])).resampled(50, 0)
    np.testing.assert_allclose(own, table.resampled(50, 0) * [0.5, 0.8])
    others = corrected(table, np.array([[0.0, 1.0], [0.0, 0.0]])).products
    per_token = others / table.reference_tokens
    np.testing.assert_allclose(per_token[..., 1, :], np.broadcast_to(per_token[..., 1, :1], (2, 3, 4, 4)))
    np.testing.assert_allclose(
        others[..., 1, :].sum((0, 2, 3)) / table.domain_tokens.sum(1) / table.reference_tokens[1].sum(),
        table.matrix()[:, 0],
    )
