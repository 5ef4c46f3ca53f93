"""The influence table: its arithmetic, its intervals, and whether it says what really happens to a reference loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from ideal.data.examples import ExampleSet
from ideal.influence.table import InfluenceTable, shard, split
from tests.ideal.dense import factored
from tests.ideal.made import MLP, example_set, full_loss, influence, llama, run

L, M, B, R = 2, 3, 4, 2


@pytest.fixture
def table() -> InfluenceTable:
    """Random products of blocks with unequal numbers of tokens."""
    random = np.random.default_rng(0)
    domain = random.integers(5, 50, (M, B)).astype(float)
    reference = random.integers(5, 50, (R, B)).astype(float)
    means = 1 + 0.3 * random.standard_normal((L, M, B, R, B))
    products = means * domain[None, :, :, None, None] * reference[None, None, None]
    return InfluenceTable(products, domain, reference, np.array([1.0, 3.0]), np.zeros((M, R)))


def direct(table: InfluenceTable, j: int, r: int) -> float:
    """a_jr by the formula: sums over everything, one division at the end."""
    total = sum(table.products[x, j, b, r, c] for x in range(L) for b in range(B) for c in range(B))
    return float(total / sum(table.domain_tokens[j]) / sum(table.reference_tokens[r]))


def test_the_matrix_is_the_mean_per_token(table: InfluenceTable) -> None:
    expected = [[direct(table, j, r) for r in range(R)] for j in range(M)]
    np.testing.assert_allclose(table.matrix(), expected)
    np.testing.assert_allclose(table.by_layer().sum(0), expected)
    by_block = table.products / table.domain_tokens[None, :, :, None, None] / table.reference_tokens[None, None, None]
    assert np.abs(by_block.mean((2, 4)).sum(0) / table.matrix() - 1).max() > 0.02, "a mean of block means would show"


def test_objectives(table: InfluenceTable) -> None:
    matrix, tokens = table.matrix(), table.reference_tokens.sum(1)
    np.testing.assert_allclose(table.objective(matrix, "macro"), matrix.mean(1))
    np.testing.assert_allclose(table.objective(matrix, "micro"), (matrix * tokens).sum(1) / tokens.sum())
    assert table.objective_loss("macro") == pytest.approx(2.0)
    assert table.objective_loss("micro") == pytest.approx(float((tokens * [1, 3]).sum() / tokens.sum()))


def test_the_bootstrap_resamples_blocks_of_both_sides(table: InfluenceTable) -> None:
    found = table.resampled(4000, seed=1)
    assert found.shape == (4000, M, R)
    np.testing.assert_allclose(np.median(found, 0), table.matrix(), rtol=0.05)
    np.testing.assert_array_equal(found, table.resampled(4000, seed=1))
    assert not np.array_equal(found, table.resampled(4000, seed=2))

    random = np.random.default_rng(3)
    by_hand = []
    for _ in range(3000):
        b, c = random.integers(0, B, B), random.integers(0, B, B)
        total = table.products[:, 0][:, b][:, :, 1][:, :, c].sum()
        value = total / table.domain_tokens[0, b].sum() / table.reference_tokens[1, c].sum()
        by_hand.append((value - table.matrix()[0, 1]) * np.sqrt(B / random.chisquare(B - 1)))
    quartiles = np.quantile(found[:, 0, 1], [0.25, 0.75]) - table.matrix()[0, 1]
    np.testing.assert_allclose(quartiles, np.quantile(by_hand, [0.25, 0.75]), rtol=0.12)


def test_every_set_is_resampled_by_itself() -> None:
    """One draw of block numbers for all sets would tie their errors together."""
    by_domain, by_reference = np.random.default_rng(6).standard_normal((2, 2, 8))
    products = 10 + by_domain[None, :, :, None, None] + by_reference[None, None, None]
    ones = np.ones((2, 8))
    found = InfluenceTable(products, ones, ones, np.ones(2), np.zeros((2, 2))).resampled(20000, seed=0)
    domains, references = found[:, 0] - found[:, 1], found[:, :, 0] - found[:, :, 1]
    student = np.sqrt(7 / 5)  # the standard deviation of t with 7 degrees of freedom
    assert domains[:, 0].std() == pytest.approx(student * np.sqrt((by_domain.var(1, ddof=1) / 8).sum()), rel=0.05)
    assert references[:, 0].std() == pytest.approx(student * np.sqrt((by_reference.var(1, ddof=1) / 8).sum()), rel=0.05)


def test_equal_blocks_leave_nothing_uncertain(table: InfluenceTable) -> None:
    """Blocks of different sizes and one mean: only a ratio of sums has no spread then."""
    products = np.ones_like(table.products) * table.domain_tokens[None, :, :, None, None] * table.reference_tokens
    same = InfluenceTable(products, table.domain_tokens, table.reference_tokens, table.reference_loss, table.crowding)
    np.testing.assert_allclose(same.resampled(50, seed=0), L)


@pytest.mark.parametrize("blocks", [4, 8, 16])
def test_intervals_hold_what_they_say(blocks: int) -> None:
    """Sets drawn anew: their 90 % intervals hold the truth in 90 % of cases, or a little more where blocks are few.

    Resamples as they come would hold it in 80 % with 4 blocks and in 87 % with 8.
    """
    random, held, plain, tried = np.random.default_rng(5), 0, 0, 600

    def sums(tokens: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.asarray(3 * tokens + np.sqrt(tokens) * random.standard_normal(tokens.shape))

    for _ in range(tried):
        tokens = [random.integers(20, 60, (1, blocks)).astype(float) for _ in range(2)]
        products = np.einsum("mb,rc->mbrc", *map(sums, tokens))[None]
        found = InfluenceTable(products, *tokens, np.ones(1), np.zeros((1, 1)))
        cloud = found.resampled(300, seed=0)[:, 0, 0]
        low, high = np.quantile(cloud, [0.05, 0.95])
        held += low <= 9 <= high
        narrow = found.matrix()[0, 0] + (np.array([low, high]) - found.matrix()[0, 0]) / student(blocks)
        plain += narrow[0] <= 9 <= narrow[1]
    assert 0.87 <= held / tried <= 0.96
    assert plain < held, "without Student's factor it would be less"


def student(blocks: int) -> float:
    """How much wider a 90 % interval is than the plain bootstrap's."""
    return float(stats.t.ppf(0.95, blocks - 1) / stats.norm.ppf(0.95) * np.sqrt(blocks / (blocks - 1)))


def test_a_table_survives_the_file(table: InfluenceTable, tmp_path: Path) -> None:
    table.save(tmp_path / "t")
    again = InfluenceTable.load(tmp_path / "t")
    for name, value in vars(table).items():
        np.testing.assert_array_equal(getattr(again, name), value)


# --- Blocks and shards ---


def test_split_covers_the_sample_once() -> None:
    examples = example_set(11, 0)
    sample = [9, 2, 4, 0, 7, 1, 10]
    blocks = split("train/a", examples, sample, 3, 0.6)
    assert sorted(key for block in blocks for key in block.keys) == sorted(sample)
    assert [len(block.items) for block in blocks] == [3, 2, 2]
    for block in blocks:
        for key, item in zip(block.keys, block.items, strict=True):
            np.testing.assert_array_equal(item[0], examples[key][0])
    tokens = sum(int(m[1:].sum()) for block in blocks for _, m in block.items)
    assert [block.weight * tokens for block in blocks] == pytest.approx([0.6] * 3)
    assert not any(block.weight for block in split("reference/a", examples, sample, 3, 0.0))


def test_shards_are_even_and_whole() -> None:
    blocks = [block for s in range(4) for block in split(f"train/{s}", example_set(20, s), list(range(20)), 4, 1.0)]
    parts = shard(blocks, 3)
    assert sorted(index for part in parts for index in part) == list(range(16))
    loads = [sum(len(ids) for index in part for ids, _ in blocks[index].items) for part in parts]
    assert max(loads) < 1.15 * min(loads)


# --- The truth ---

EPSILON = 1e-5
DOMAINS = [example_set(9, 1), example_set(7, 2)]
REFERENCES = [example_set(6, 3), example_set(8, 4)]


def mean_loss(model: torch.nn.Module, examples: ExampleSet) -> float:
    with torch.no_grad():
        total, count = full_loss(model, examples)
    return float(total) / count


def moved(
    model: torch.nn.Module, direction: dict[str, torch.Tensor], references: list[ExampleSet]
) -> npt.NDArray[np.float64]:
    """[R] the reference losses' change along −direction, per unit of it, by central differences."""
    losses = []
    for sign in (-1, 1):
        for layer, d in direction.items():
            model.get_submodule(layer).weight.data += sign * EPSILON * d
        losses.append(np.array([mean_loss(model, reference) for reference in references]))
        for layer, d in direction.items():
            model.get_submodule(layer).weight.data -= sign * EPSILON * d
    return np.asarray((losses[0] - losses[1]) / (2 * EPSILON))


def mean_gradient(model: torch.nn.Module, examples: ExampleSet) -> dict[str, torch.Tensor]:
    model.requires_grad_(True)
    total, count = full_loss(model, examples)
    weights = [model.get_submodule(layer).weight for layer in MLP]
    found = dict(zip(MLP, torch.autograd.grad(total / count, weights), strict=True))
    model.requires_grad_(False)
    return found


@pytest.mark.parametrize("solver", ["identity", "kfac"])
def test_influence_is_what_a_small_step_does_to_the_reference_losses(solver: str) -> None:
    """One step along a domain's preconditioned mean gradient lowers reference loss r by a_jr per unit of step."""
    model = llama()
    table = influence(model, DOMAINS, REFERENCES, [0.7, 0.3], solver=solver, blocks=3, damping=0.05)
    parts = [
        block
        for number, (domain, weight) in enumerate(zip(DOMAINS, [0.7, 0.3], strict=True))
        for block in split(f"train/{number}", domain, list(range(len(domain))), 3, weight)
    ]
    curvature = factored(run(model, parts)[0], 0.05)
    matrix = table.matrix()
    for j, domain in enumerate(DOMAINS):
        gradient = mean_gradient(model, domain)
        direction = {
            x: torch.linalg.solve(curvature[x], g.flatten()).view_as(g) if solver == "kfac" else g
            for x, g in gradient.items()
        }
        change = moved(model, direction, REFERENCES)
        np.testing.assert_allclose(change, -matrix[j], rtol=1e-5, atol=1e-7)
    for r, reference in enumerate(REFERENCES):
        assert table.reference_loss[r] == pytest.approx(mean_loss(model, reference))
    other = influence(
        model, DOMAINS, REFERENCES, [0.7, 0.3], solver="identity" if solver == "kfac" else "kfac", damping=0.05
    )
    ratio = other.matrix() / matrix
    assert ratio.max() > 1.05 * ratio.min(), "the other solver would show, whatever its scale"


def test_crowding_is_by_the_definition() -> None:
    """Every block's gradient by plain autograd: how a domain's blocks scatter, weight by weight, beside the mixture."""
    model, blocks, weights = llama(), 3, np.array([0.7, 0.3])
    found = influence(model, DOMAINS, REFERENCES, weights.tolist(), solver="identity", blocks=blocks)
    scatter, means = [], []
    for domain in DOMAINS:
        parts = [[domain[i] for i in range(b, len(domain), blocks)] for b in range(blocks)]
        tokens = np.array([sum(int(mask[1:].sum()) for _, mask in part) for part in parts])
        rows = np.stack([flat(mean_gradient(model, part)) for part in parts])
        mean = (tokens / tokens.sum()) @ rows
        means.append(mean)
        scatter.append((tokens[:, None] * (rows - mean) ** 2).sum(0) / (blocks - 1))
    mixed, whole = weights @ np.stack(means), weights @ np.stack(scatter)
    wanted = np.stack([flat(mean_gradient(model, reference)) for reference in REFERENCES])
    expected = (np.stack(scatter) / whole * mixed) @ wanted.T - wanted @ mixed
    np.testing.assert_allclose(found.crowding, expected, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(weights @ found.crowding, 0, atol=1e-12)
    assert np.abs(expected).max() > 0.05 * np.abs(found.matrix()).max(), "domains differ in how noisy they are"


def flat(gradient: dict[str, torch.Tensor]) -> npt.NDArray[np.float64]:
    return torch.cat([gradient[layer].flatten() for layer in MLP]).numpy()


def test_a_domain_helps_a_reference_set_of_its_own_kind_most() -> None:
    """Positive is good: the sign that every volume hangs on."""
    twos = ExampleSet(np.array([3, 4, 2] * 4, np.int32), np.array([0, 0, 1] * 4, bool), np.arange(0, 13, 3))
    nines = ExampleSet(np.array([3, 4, 9] * 4, np.int32), np.array([0, 0, 1] * 4, bool), np.arange(0, 13, 3))
    table = influence(llama(), [twos, nines], [twos, nines], [0.5, 0.5], solver="kfac")
    matrix = table.matrix()
    assert (np.diag(matrix) > 0).all()
    assert matrix[0, 1] < 0
    assert matrix[1, 0] < 0
