"""Who helps and hurts whom: what was planted is found, and noise is told from it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from ideal.analysis.pairs import Pair, discoveries, p_values, pairs, relative
from ideal.influence.table import InfluenceTable

Array = npt.NDArray[np.float64]
M, B = 4, 8
EVEN = np.full(M, 1 / M)


def table(domain: Array, reference: Array) -> InfluenceTable:
    """From gradient sums of blocks, [M, B, d] and [R, B, d], and no curvature."""
    ones = np.ones((M, B))
    return InfluenceTable(np.einsum("mbd,rcd->mbrc", domain, reference)[None], ones, ones, np.ones(M), np.zeros((M, M)))


def above(weights: Array) -> Callable[[Array], Array]:
    """Examples of equal length and like noise: what a domain is worth is its influence above the mixture's."""
    return lambda matrix: np.asarray(matrix - np.einsum("j,...jr->...r", weights, matrix)[..., None, :])


def found(made: InfluenceTable, resamples: int = 500, weights: Array = EVEN) -> list[Pair]:
    return pairs(made, above(weights), resamples=resamples, confidence=0.9, seed=0)


def test_an_effect_is_in_units_of_the_largest_on_its_set() -> None:
    matrix = np.array([[1.0, 5.0], [3.0, 5.0], [-2.0, 5.0]])  # means over the mixture: 1 and 5
    worth = above(np.array([0.5, 0.3, 0.2]))
    np.testing.assert_allclose(relative(worth(matrix), matrix), [[0, 0], [2 / 3, 0], [-1, 0]], atol=1e-12)
    other = 7 * matrix[None] + [[[9, -4]]]
    np.testing.assert_allclose(relative(worth(other), other)[0], relative(worth(matrix), matrix), atol=1e-12)


def planted(seed: int, noise: float = 0.3) -> InfluenceTable:
    """Domain 0 helps set 1, domain 2 hurts it as much; else all domains are alike. All blocks are noisy."""
    random = np.random.default_rng(seed)
    direction = np.eye(6)
    domain = np.zeros((M, 1, 6)) + direction[5]
    domain[0] += direction[0]
    domain[2] -= direction[0]
    reference = np.zeros((M, 1, 6)) + direction[5]
    reference[1] += direction[0]
    scatter = random.standard_normal((2, M, B, 6)) * noise
    return table(domain + scatter[0], reference + scatter[1])


def test_a_planted_conflict_and_a_planted_help_are_named() -> None:
    wrong = []
    for seed in range(20):
        named = {(p.domain, p.reference): p for p in found(planted(seed)) if p.effect != "undecided"}
        assert named[0, 1].effect == "helps"
        assert named[2, 1].effect == "hurts"
        assert 0 < named[0, 1].low <= named[0, 1].value <= 1
        assert named[2, 1].high < 0
        wrong.append(1 - 2 / len(named))
    assert np.mean(wrong) < 0.15, "the false share of what was named: 0.1 is what was asked for"


def test_three_blocks_tell_nothing() -> None:
    made = planted(0)
    few = InfluenceTable(made.products[:, :, :3, :, :3], np.ones((M, 3)), np.ones((M, 3)), np.ones(M), np.zeros((M, M)))
    assert {p.effect for p in found(few)} == {"undecided"}


def test_noise_alone_is_named_about_as_rarely_as_promised() -> None:
    """All domains are the same to every set, each set along a direction of its own: first-order noise, the worst kind.

    At a rate of 0.1 it should be 1 table in 10; without a control for many pairs it is most.
    """
    random, tried, named, uncontrolled, small = np.random.default_rng(0), 60, 0, 0, 0.0
    for _ in range(tried):
        domain, reference = random.standard_normal((2, M, B, 30))
        domain[..., :M] += 20
        reference += 20 * np.eye(M, 30)[:, None]
        seen = found(table(domain, reference))
        named += any(p.effect != "undecided" for p in seen)
        uncontrolled += any(p.p < 0.1 for p in seen)
        small += float(np.mean([p.p < 0.1 for p in seen])) / tried
    assert named / tried < 0.2
    assert uncontrolled / tried > 0.4
    assert 0.04 < small < 0.13, "p-values are about uniform"


def test_unrelated_gradients_name_nobody() -> None:
    random = np.random.default_rng(1)
    seen = [pair for _ in range(40) for pair in found(table(*random.standard_normal((2, M, B, 50))))]
    assert sum(pair.effect != "undecided" for pair in seen) <= 2


def test_a_domain_and_its_own_set_are_no_pair() -> None:
    seen = found(planted(0))
    assert {(p.domain, p.reference) for p in seen} == {(j, r) for j in range(M) for r in range(M) if j != r}
    assert [p.p for p in seen] == sorted(p.p for p in seen)


def test_the_token_shares_are_the_mixtures() -> None:
    """A mixture that is nearly all domain 0 is as good as domain 0: more of it changes nothing."""
    value = {(p.domain, p.reference): p.value for p in found(planted(0), weights=np.array([0.97, 0.01, 0.01, 0.01]))}
    assert abs(value[0, 1]) < 0.05
    assert value[2, 1] == pytest.approx(-1)


def test_p_values_count_both_sides() -> None:
    cloud = np.array([[1.0, -1.0, -1.0, 0.0], [1.0, -1.0, 1.0, 0.0], [1.0, -2.0, 1.0, 0.0], [2.0, -2.0, 1.0, 0.0]])
    np.testing.assert_allclose(p_values(cloud), [1 / 5, 1 / 5, 1 / 2, 1])


def test_benjamini_and_hochbergs_own_example() -> None:
    """Section 4 of their paper (1995): fifteen tests, four of them found at 0.05; Bonferroni finds three."""
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240]
    p += [0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    shuffled = np.random.default_rng(0).permutation(15)
    assert sorted(np.array(p)[shuffled][discoveries(np.array(p)[shuffled], 0.05)]) == p[:4]
    assert discoveries(np.array([0.04, 0.05, 0.045]), 0.05).all(), "it steps up: 0.04 alone is above 0.05 / 3"
    assert not discoveries(np.array([0.2, 0.3]), 0.05).any()
