"""Every solver against the dense matrix it stands for, in fp64, at a damping so small that a wrong one shows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from ideal.config.config import InfluenceConfig
from ideal.influence import kfac
from ideal.influence.accumulate import Block
from ideal.influence.ekfac import squared_gradients
from ideal.influence.exact import GaussNewton, Vectors, conjugate_gradients
from ideal.influence.in_process import influence_tables
from ideal.influence.kfac import Eigenbasis, eigenbasis
from ideal.influence.layers import input_group
from ideal.influence.products import block_products, set_sums, with_sets
from ideal.influence.sampled import Sampled, curvature_blocks
from ideal.influence.solvers import layer_bases, layer_damping, layer_inverse
from ideal.influence.table import InfluenceTable, split
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
    random_vectors,
    sizes,
)
from tests.ideal.made import MLP, influence, llama, run

CPU = torch.device("cpu")
SOLVERS = ["identity", "adam", "kfac", "ekfac", "exact"]
DAMPING = 0.05
BOUND = 1e-6
"""Relative error allowed to the right answer; `identity` misses it by far."""
FEW = 10
"""Products of `exact` where two ways to the same must agree, right or not."""


@pytest.fixture
def model() -> LlamaForCausalLM:
    return llama()


# --- exact ---


def test_gauss_newton_products_are_the_matrixs(model: LlamaForCausalLM) -> None:
    vectors = random_vectors(model, 3, 1)
    found = GaussNewton(model, MLP, blocks(), 64, CPU).product(vectors)
    torch.testing.assert_close(flat(found), flat(vectors) @ dense_gauss_newton(model))


def test_exact_influence_is_the_dense_solve(model: LlamaForCausalLM) -> None:
    """All tracked layers together; the layers' own blocks alone would be another answer, and so would none."""
    own = lambdas(model)
    found = influence(model, DOMAINS, REFERENCES, WEIGHTS, solver="exact", schedule=own).matrix()
    h = dense_gauss_newton(model)
    damping = diagonal(own)
    g = torch.stack([mean_gradients(model, d) for d in DOMAINS])
    r = torch.stack([mean_gradients(model, d) for d in REFERENCES])
    right = (g @ torch.linalg.solve(h + torch.diag(damping), r.T)).numpy()
    np.testing.assert_allclose(found, right, rtol=BOUND, atol=BOUND * np.abs(right).max())

    blockwise = layer_by_layer(model, h)
    wrong = {
        "identity": influence(model, DOMAINS, REFERENCES, WEIGHTS, solver="identity").matrix(),
        "the optimiser alone": influence(model, DOMAINS, REFERENCES, WEIGHTS, solver="adam", schedule=own).matrix(),
        "layer by layer": (g @ torch.linalg.solve(blockwise + torch.diag(damping), r.T)).numpy(),
    }
    for what, answer in wrong.items():
        scaled = answer * (answer * right).sum() / (answer * answer).sum()
        assert np.abs(scaled - right).max() > 1e-3 * np.abs(right).max(), what


def test_relative_damping_is_of_each_layers_mean_eigenvalue(model: LlamaForCausalLM) -> None:
    strong = 10 * DAMPING  # soon solved
    found = influence(model, DOMAINS, REFERENCES, WEIGHTS, solver="exact", damping=strong).matrix()
    sums, _ = run(model, blocks())
    diagonal = torch.cat(
        [
            torch.full(
                (s.numel(),),
                float(strong * sums.a[input_group(x)].trace() * sums.s[x].trace() / sums.positions / s.numel()),
            )
            for x, s in sizes(model).items()
        ]
    )
    g = torch.stack([mean_gradients(model, d) for d in DOMAINS])
    r = torch.stack([mean_gradients(model, d) for d in REFERENCES])
    right = g @ torch.linalg.solve(dense_gauss_newton(model) + torch.diag(diagonal).double(), r.T)
    np.testing.assert_allclose(found, right.numpy(), rtol=BOUND, atol=BOUND)


def test_conjugate_gradients_say_how_far_they_came(model: LlamaForCausalLM) -> None:
    h = dense_gauss_newton(model)
    b, damping = random_vectors(model, 2, 3), dict.fromkeys(MLP, 0.01)

    def product(vectors: Vectors) -> Vectors:
        parts = (flat(vectors) @ h).split([s.numel() for s in sizes(model).values()], 1)
        return {x: part.view(-1, *s) for (x, s), part in zip(sizes(model).items(), parts, strict=True)}

    short = conjugate_gradients(product, b, damping, tolerance=1e-10, limit=3)
    assert short.products == 3
    left = flat(b) - flat(short.vectors) @ (h + 0.01 * torch.eye(len(h)))
    assert short.residuals == pytest.approx((left.norm(dim=1) / flat(b).norm(dim=1)).tolist(), rel=1e-6)
    assert max(short.residuals) > 1e-3
    full = conjugate_gradients(product, b, damping, tolerance=1e-10, limit=10_000)
    assert max(full.residuals) <= 1e-10
    assert full.products < 10_000


def test_blocks_of_a_solved_set_add_up_to_it() -> None:
    """Shares of tokens divide a set's solution; the sum over blocks is the set's own product, exactly."""
    random = torch.Generator().manual_seed(0)
    gradients = torch.randn(3 * 4, 5, 7, generator=random, dtype=torch.float64)
    tokens = np.array([[3.0, 5, 2, 6], [1, 1, 9, 4], [8, 2, 2, 2]])
    m = torch.randn(35, 35, generator=random, dtype=torch.float64)
    m = m @ m.T
    sums = gradients.view(3, 4, 35).sum(1)
    products = block_products(with_sets((sums @ m).view(3, 5, 7), gradients), tokens, 1)
    torch.testing.assert_close(set_sums(gradients, 4), sums.view(3, 5, 7))
    assert products.shape == (4, 8)
    right = (sums[:1] @ m @ sums[1:].T).numpy()
    np.testing.assert_allclose(products.reshape(4, 2, 4).sum((0, 2)), right[0])
    by_block = (gradients.view(12, 35)[:4] @ m @ sums[1:].T).numpy()
    np.testing.assert_allclose(products.reshape(4, 2, 4).sum(2), by_block)


def test_the_curvatures_examples_stand_for_all() -> None:
    settings = InfluenceConfig(blocks=2, examples=4, curvature_examples=3)
    given = blocks()
    chosen = curvature_blocks(given, 2, settings)
    assert [len(block.items) for block in chosen] == [2, 2]
    assert [list(block.keys) for block in chosen] == [[given[i].keys[0], given[i + 1].keys[0]] for i in (0, 2)]
    assert [block.weight * block.supervised() for block in chosen] == pytest.approx(WEIGHTS)
    dealt = curvature_blocks(blocks(), 2, settings, parts=2)
    assert [len(block.items) for block in dealt] == [1, 1, 1, 1]
    assert [b.weight for b in dealt] == [b.weight for b in chosen for _ in range(2)]


# --- EK-FAC ---


def test_ekfac_is_nearer_to_the_fisher_than_kfac(model: LlamaForCausalLM) -> None:
    """In Frobenius norm, layer by layer, against the per-example Fisher that both approximate."""
    sums, _ = run(model, blocks(), fisher="empirical")
    bases = {layer: layer_bases(sums, layer) for layer in MLP}
    vectors = {layer: (s.vectors, a.vectors) for layer, (a, s) in bases.items()}
    squares = squared_gradients(model, vectors, blocks(), fisher="empirical", seed=0, batch_tokens=64, device=CPU)
    singles = [
        (Block(b.set, 0, [item], [key], b.weight), b.weight)
        for b in blocks()
        for item, key in zip(b.items, b.keys, strict=True)
    ]
    _, gradients = run(model, [block for block, _ in singles], factors=False)
    for layer, (a, s) in bases.items():
        g = torch.stack([found.gradients[layer].flatten() for found in gradients])
        fisher = (g.T * torch.tensor([w for _, w in singles])) @ g
        basis = torch.kron(s.vectors, a.vectors)
        factored = sums.positions * torch.outer(s.values, a.values).flatten()
        errors = {
            name: float((fisher - basis @ torch.diag(values) @ basis.T).norm())
            for name, values in (("kfac", factored), ("ekfac", squares[layer].flatten()))
        }
        assert errors["ekfac"] < 0.99 * errors["kfac"]
        torch.testing.assert_close(squares[layer].flatten(), torch.diag(basis.T @ fisher @ basis))
        assert not torch.allclose(squares[layer], (s.vectors.T @ g.sum(0).view_as(squares[layer]) @ a.vectors) ** 2), (
            "the square of the summed gradient would show"
        )


def refined(model: LlamaForCausalLM) -> tuple[dict[str, tuple[Eigenbasis, Eigenbasis]], dict[str, torch.Tensor]]:
    """(bases of A and S, eigenvalues in them) by layer."""
    sums, _ = run(model, blocks())
    bases = {layer: layer_bases(sums, layer) for layer in MLP}
    vectors = {layer: (s.vectors, a.vectors) for layer, (a, s) in bases.items()}
    squares = squared_gradients(model, vectors, blocks(), fisher="sampled", seed=0, batch_tokens=64, device=CPU)
    return bases, squares


def test_ekfac_solves_with_its_own_eigenvalues(model: LlamaForCausalLM) -> None:
    found = influence(model, DOMAINS, REFERENCES, WEIGHTS, solver="ekfac", damping=DAMPING).by_layer()
    bases, squares = refined(model)
    for number, layer in enumerate(MLP):
        a, s = bases[layer]
        start = sum(v.numel() for x, v in sizes_before(model, layer))
        part = slice(start, start + sizes(model)[layer].numel())
        basis = torch.kron(s.vectors, a.vectors)
        values = squares[layer].flatten()
        inverse = basis @ torch.diag(1 / (values + DAMPING * values.mean())) @ basis.T
        for j, domain in enumerate(DOMAINS):
            for r, reference in enumerate(REFERENCES):
                right = mean_gradients(model, reference)[part] @ inverse @ mean_gradients(model, domain)[part]
                assert found[number, j, r] == pytest.approx(float(right), rel=BOUND)


def sizes_before(model: LlamaForCausalLM, layer: str) -> list[tuple[str, torch.Size]]:
    return list(sizes(model).items())[: MLP.index(layer)]


# --- adam, and the optimiser's own damping ---


def test_adam_divides_by_the_optimisers_damping(model: LlamaForCausalLM) -> None:
    own = lambdas(model)
    found = influence(model, DOMAINS, REFERENCES, WEIGHTS, solver="adam", schedule=own).matrix()
    damping = diagonal(own)
    right = [
        [float((mean_gradients(model, d) * mean_gradients(model, r) / damping).sum()) for r in REFERENCES]
        for d in DOMAINS
    ]
    np.testing.assert_allclose(found, right, rtol=BOUND)


def test_a_layers_one_damping_moves_it_as_far() -> None:
    damping = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    assert layer_damping(damping) == pytest.approx(1 / np.mean([1, 1 / 2, 1 / 4, 1 / 8]))


@pytest.mark.parametrize("solver", ["kfac", "ekfac"])
def test_factored_solvers_take_it(model: LlamaForCausalLM, solver: str) -> None:
    """As its harmonic mean over each layer: what a damping that is a multiple of the mean eigenvalue can say, too."""
    own = lambdas(model)
    found = influence(model, DOMAINS, REFERENCES, WEIGHTS, solver=solver, schedule=own).by_layer()
    sums, _ = run(model, blocks())
    layer = MLP[0]
    if solver == "ekfac":
        mean = float(refined(model)[1][layer].mean())
    else:
        trace = float(sums.a[input_group(layer)].trace() * sums.s[layer].trace())
        mean = trace / sums.positions / sizes(model)[layer].numel()
    relative = layer_damping(own[f"{layer}.weight"]) / mean
    other = influence(model, DOMAINS, REFERENCES, WEIGHTS, solver=solver, damping=relative).by_layer()
    np.testing.assert_allclose(found[0], other[0], rtol=BOUND)
    assert not np.allclose(found[1], other[1], rtol=1e-3), "each layer has its own"


# --- What must not matter ---


@pytest.mark.parametrize(("solver", "joint"), [*((solver, False) for solver in SOLVERS), ("kfac", True)])
def test_neither_batching_order_padding_nor_checkpointing_matters(solver: str, joint: bool) -> None:
    """fp64: equal to 1e-9 of the largest entry; `exact` after as many products, far from its solution."""

    def matrix(model: LlamaForCausalLM, batch_tokens: int, turned: bool = False) -> np.ndarray:
        parts = blocks() + [
            block
            for number, reference in enumerate(REFERENCES)
            for block in split(f"reference/{number}", reference, list(range(len(reference))), 2, 0.0)
        ]
        if turned:
            parts = [Block(b.set, b.number, b.items[::-1], b.keys[::-1], b.weight) for b in parts]
        settings = InfluenceConfig.model_validate(
            {
                "solver": solver,
                "joint": joint,
                "blocks": 2,
                "examples": 2,
                "precision": "fp32",
                "products": FEW,
                "residual": 1e-10,
            }
            | {"damping": "schedule" if solver == "exact" else DAMPING, "curvature_examples": 99}
        )
        sample = Sampled(parts, 2, settings, lambdas(model), 0, batch_tokens, CPU)
        return np.asarray(influence_tables(model, MLP, sample, [solver])[solver].matrix())

    one = matrix(llama(), 10**6)
    checkpointed = llama()
    checkpointed.gradient_checkpointing_enable()
    checkpointed.train()  # only then it recomputes; there is no dropout
    tolerance = 1e-9 * np.abs(one).max()
    np.testing.assert_allclose(matrix(llama(), 1), one, atol=tolerance)
    np.testing.assert_allclose(matrix(llama(), 40, turned=True), one, atol=tolerance)
    if solver != "exact" and not joint:  # forward-mode derivatives don't pass through checkpoints
        np.testing.assert_allclose(matrix(checkpointed, 40), one, atol=tolerance)


def test_several_solvers_share_one_pass(model: LlamaForCausalLM) -> None:
    parts = blocks() + split("reference/0", REFERENCES[0], [0, 1, 2, 3], 2, 0.0)
    settings = InfluenceConfig(blocks=2, examples=2, damping=DAMPING, products=FEW, residual=1e-10, joint=False)
    sample = Sampled(parts, 2, settings, lambdas(model), 0, 64, CPU)
    together: dict[str, InfluenceTable] = influence_tables(model, MLP, sample, SOLVERS)
    for solver in SOLVERS:
        alone = influence_tables(model, MLP, sample, [solver])[solver]
        np.testing.assert_allclose(together[solver].products, alone.products)


# --- Factors that are broken ---


def test_a_layer_that_cannot_be_inverted_is_named(model: LlamaForCausalLM) -> None:
    sums, _ = run(model, blocks())
    sums.s[MLP[1]][0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=f"{MLP[1]} isn't finite"):
        layer_bases(sums, MLP[1])
    with pytest.raises(FloatingPointError, match=f"{MLP[1]} isn't finite"):
        layer_inverse(sums, MLP[1], InfluenceConfig(), None, {})


def test_a_decomposition_that_fails_is_tried_with_more_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    real, tries = torch.linalg.eigh, []

    def stubborn(matrix: torch.Tensor) -> object:
        tries.append(matrix)
        if len(tries) < 3:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    factor = torch.diag(torch.tensor([1.0, 3.0]))
    found = eigenbasis(factor)
    assert found.ridge == kfac.RIDGES[2]
    torch.testing.assert_close(found.values, torch.tensor([1.0, 3.0]).double() + 2 * kfac.RIDGES[2])
    monkeypatch.setattr(torch.linalg, "eigh", _never)
    with pytest.raises(FloatingPointError, match="no eigen-decomposition"):
        eigenbasis(factor)


def _never(matrix: torch.Tensor) -> object:
    raise torch.linalg.LinAlgError("did not converge")


def test_a_singular_factor_is_damped_and_its_condition_said() -> None:
    singular = torch.diag(torch.tensor([0.0, 1.0]).double())
    found = kfac.curvature(eigenbasis(singular), eigenbasis(singular), singular, 0.1, torch.float64)
    assert found.condition > 1e12
    assert bool(torch.isfinite(found.solve(torch.ones(2, 2).double())).all())


def test_kfac_is_the_dense_block_where_it_is_exact() -> None:
    """A deep linear network and one datum: each layer's Gauss-Newton block is S ⊗ A."""
    random = torch.Generator().manual_seed(1)
    widths = [4, 5, 3, 6]
    weights = [torch.randn(o, i, generator=random).double().requires_grad_() for i, o in itertools.pairwise(widths)]
    x = torch.randn(widths[0], generator=random).double()
    inputs = [x]
    for w in weights:
        inputs.append(w @ inputs[-1])
    z = inputs[-1]
    p = z.detach().softmax(0)
    output_hessian = torch.diag(p) - torch.outer(p, p)
    for number, w in enumerate(weights):
        j = torch.stack([torch.autograd.grad(value, w, retain_graph=True)[0].flatten() for value in z])
        dense = j.T @ output_hessian @ j
        k = torch.stack([torch.autograd.grad(value, inputs[number + 1], retain_graph=True)[0] for value in z])
        s, a = k.T @ output_hessian @ k, torch.outer(inputs[number], inputs[number]).detach()
        torch.testing.assert_close(torch.kron(s, a), dense)
        of_s, of_a = eigenbasis(s), eigenbasis(a)
        eigen = kfac.curvature(of_a, of_s, torch.outer(of_s.values, of_a.values), DAMPING, torch.float64)
        g = torch.randn(w.shape, generator=random).double()
        damped = dense + DAMPING * dense.diagonal().mean() * torch.eye(len(dense)).double()
        torch.testing.assert_close(
            eigen.solve(g).flatten(), torch.linalg.solve(damped, g.flatten()), rtol=1e-8, atol=1e-8
        )


def test_kfac_is_the_dense_solve_of_both_damped_factors(model: LlamaForCausalLM) -> None:
    """Every layer and pair of sets; another damping would show."""
    given = (model, DOMAINS, REFERENCES, WEIGHTS)
    found = influence(*given, solver="kfac", damping=DAMPING).by_layer()
    other = influence(*given, solver="kfac", damping=2 * DAMPING).by_layer()
    start = 0
    for number, (layer, curvature) in enumerate(factored(run(model, blocks())[0], DAMPING).items()):
        part = slice(start, start + sizes(model)[layer].numel())
        g, r = (torch.stack([mean_gradients(model, x)[part] for x in sets], 1) for sets in (DOMAINS, REFERENCES))
        right = (g.T @ torch.linalg.solve(curvature, r)).numpy()
        np.testing.assert_allclose(found[number], right, rtol=BOUND, atol=BOUND * np.abs(right).max())
        assert np.abs(other[number] - right).max() > 0.01 * np.abs(right).max()
        start = part.stop
