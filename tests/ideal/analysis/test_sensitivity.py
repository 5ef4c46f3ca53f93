"""How the mixture hangs on the reference set: answers that are known by how the table was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ideal.analysis.sensitivity import (
    Scenario,
    Start,
    cosines,
    flips,
    half_blocks,
    on_blocks,
    resampled_blocks,
    scenarios,
)
from ideal.config.config import EquilibriumConfig
from ideal.equilibrium import update
from ideal.influence.table import InfluenceTable

Array = npt.NDArray[np.float64]
NAMES = ["math", "chat", "code"]
VOLUMES, POOLS, LENGTHS, M = [400, 300, 200], [10_000] * 3, [8.0, 20.0, 5.0], 0.2
WHOLE, AGAIN, HALF = "the whole reference set", "drawn again (bootstrap)", "half of it"
AGAINST = "half of it, against the other half"


def made(influence: Any, tokens: Any = None, spread: float = 0.0) -> InfluenceTable:
    """A table with these influences a_jrc [M, R, B] on each reference block; domain blocks scatter by ``spread``."""
    a = np.asarray(influence, float)
    reference = np.full(a.shape[1:], 16.0) if tokens is None else np.asarray(tokens, float)
    blocks = 1 + spread * np.array([1, -1, 1, -1])  # their mean is 1
    products = np.einsum("jrc,b,rc->jbrc", a, 8 * blocks, reference)[None]
    return InfluenceTable(products, np.full((len(a), 4), 8.0), reference, np.ones(a.shape[1]), np.zeros(a.shape[:2]))


def step(influence: Any, **settings: Any) -> tuple[list[float], list[int]]:
    """β and volumes by the update itself, from a_j."""
    a = np.asarray(influence, float)
    n = len(a)
    config = EquilibriumConfig(**settings)
    found = update(a, np.tile(a, (2, 1)), np.zeros(n), VOLUMES[:n], POOLS[:n], LENGTHS[:n], config, M, 0.9)
    return found.beta, found.volumes


def examined(
    table: InfluenceTable, names: Sequence[str] = NAMES, seed: int = 0, **settings: Any
) -> dict[str, Scenario]:
    n = len(table.domain_tokens)
    found = scenarios(
        table,
        names,
        Start(VOLUMES[:n], POOLS[:n], LENGTHS[:n], M),
        EquilibriumConfig(**settings),
        draws=40,
        confidence=0.9,
        seed=seed,
    )
    return {each.name: each for each in found}


@pytest.fixture
def noisy() -> InfluenceTable:
    """Reference blocks that differ in influence and in tokens."""
    random = np.random.default_rng(0)
    return made(random.standard_normal((3, 3, 6)), random.integers(5, 50, (3, 6)))


def test_parts_of_the_reference_set_have_their_own_influence(noisy: InfluenceTable) -> None:
    np.testing.assert_allclose(on_blocks(noisy, np.ones((1, 3, 6)))[0], noisy.matrix())
    a = noisy.products.sum((0, 2)) / noisy.domain_tokens.sum(1)[:, None, None] / noisy.reference_tokens
    counts = np.zeros((1, 3, 6))
    counts[0, :, 2], counts[0, :, 5] = 2, 1
    tokens = counts[0] * noisy.reference_tokens
    np.testing.assert_allclose(on_blocks(noisy, counts)[0], (a * tokens).sum(-1) / tokens.sum(-1))
    assert not np.allclose(on_blocks(noisy, counts)[0], (2 * a[..., 2] + a[..., 5]) / 3), "no tokens would show"


@pytest.mark.parametrize("rule", ["balanced", "paper"])
@pytest.mark.parametrize("objective", ["macro", "micro"])
def test_the_whole_set_gives_the_runs_own_update(noisy: InfluenceTable, rule: str, objective: str) -> None:
    found = examined(noisy, rule=rule, objective=objective)[WHOLE]
    beta, volumes = step(noisy.objective(noisy.matrix(), objective), rule=rule)
    np.testing.assert_allclose(found.beta.mean, beta)
    assert found.volumes.mean.tolist() == volumes
    assert found.draws == 1
    assert float(found.cosine.mean) == pytest.approx(1)
    assert float(found.flips.mean) == 0


def test_a_floor_holds_in_every_scenario(noisy: InfluenceTable) -> None:
    """The update's projection, not a β of our own: no domain may shrink below 190; code, at 200, is always bad."""
    noisy.products[:, 2] -= 2 * np.abs(noisy.products).max()
    assert all(each.volumes.high[2] < 190 for each in examined(noisy).values())
    for each in examined(noisy, floor=190).values():
        assert each.volumes.low[2] == each.volumes.high[2] == 190
        assert each.volumes.mean.sum() == pytest.approx(sum(VOLUMES))


def test_equal_blocks_leave_nothing_to_the_draw() -> None:
    """However different the domains' blocks are: those aren't drawn."""
    a = np.repeat(np.array([[0.5, -0.25, 0.125], [-1, 2, 0.25], [0, 0.5, -0.5]])[..., None], 4, axis=2)
    found = examined(made(a, spread=0.75))
    for name in (AGAIN, HALF, AGAINST):
        np.testing.assert_array_equal(found[name].beta.low, found[WHOLE].beta.mean)
        np.testing.assert_array_equal(found[name].beta.high, found[WHOLE].beta.mean)
        np.testing.assert_array_equal(found[name].volumes.low, found[WHOLE].volumes.high)
        assert float(found[name].cosine.low) == pytest.approx(1)
        assert float(found[name].flips.high) == 0
        assert found[name].draws == 40


def test_halves_that_contradict_each_other_show() -> None:
    """Two blocks of one reference set: one wants the first domain, one the second. The whole wants the first, a bit."""
    found = examined(made([[[3.0, -2.0]], [[-3.0, 2.0]]]), names=["math"])
    assert float(found[AGAINST].cosine.mean) == pytest.approx(-1)
    assert float(found[AGAINST].flips.low) == 2
    assert float(found[HALF].cosine.low) == pytest.approx(-1)
    assert float(found[HALF].cosine.high) == pytest.approx(1)
    assert -0.7 < float(found[HALF].cosine.mean) < 0.7
    assert 0.3 < float(found[HALF].flips.mean) < 1.7
    assert set(found) == {WHOLE, AGAIN, HALF, AGAINST}, "the weight of an only set cancels"


def test_losing_the_only_capability_that_favours_a_domain_flips_it() -> None:
    a = np.array([[1.0, 0.1, 0.1], [0.2, 0.6, 0.0], [-0.1, -0.1, 3.0]])[..., None].repeat(4, axis=2)
    found = examined(made(a))
    assert found[WHOLE].beta.mean[2] > 0
    assert found["without code"].beta.mean[2] < 0
    assert float(found["without code"].flips.mean) >= 1
    for other in ("without math", "without chat"):
        assert found[other].beta.mean[2] > 0
        assert float(found[other].cosine.mean) > float(found["without code"].cosine.mean)


@pytest.mark.parametrize(("words", "factor"), [("{} counts twice", 2), ("{} counts half", 0.5), ("without {}", 0)])
@pytest.mark.parametrize("objective", ["macro", "micro"])
def test_weights_are_those_of_the_objective(noisy: InfluenceTable, words: str, factor: float, objective: str) -> None:
    found, tokens = examined(noisy, objective=objective), noisy.reference_tokens.sum(1)
    for r, name in enumerate(NAMES):
        weights = tokens.copy() if objective == "micro" else np.ones(3)
        weights[r] *= factor
        beta, volumes = step(noisy.matrix() @ weights / weights.sum())
        scenario = found[words.format(name)]
        np.testing.assert_allclose(scenario.beta.mean, beta, atol=1e-9)
        assert scenario.volumes.mean.tolist() == volumes
        assert scenario.draws == 1
        assert not np.allclose(beta, found[WHOLE].beta.mean, atol=1e-3)


def test_halves_share_nothing_and_leave_nothing_out() -> None:
    half, rest = half_blocks(2, 5, 2000, seed=0)
    assert (half.sum(-1) == 2).all()
    np.testing.assert_array_equal(half + rest, 1)
    np.testing.assert_allclose(half.mean(0), 2 / 5, atol=0.05)
    assert 0.05 < (half[:, 0] == half[:, 1]).all(-1).mean() < 0.2, "each set is halved by itself: 1 in 10 agree"


def test_the_bootstrap_draws_as_many_blocks_as_there_are() -> None:
    counts = resampled_blocks(2, 5, 4000, seed=0)
    assert (counts.sum(-1) == 5).all()
    np.testing.assert_allclose(counts.mean(0), 1, atol=0.05)
    np.testing.assert_allclose(counts.var(0), 5 * 0.2 * 0.8, atol=0.06)
    assert abs(np.corrcoef(counts[:, 0, 0], counts[:, 1, 0])[0, 1]) < 0.05, "each set is drawn by itself"


def test_a_seed_gives_one_answer(noisy: InfluenceTable) -> None:
    one, again, other = (examined(noisy, seed=seed)[AGAIN].beta.mean for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_directions_are_compared_by_their_angle_and_signs() -> None:
    full = np.array([[0.1, -0.1, 0.0, 1e-15]])
    beta = np.array([[0.2, -0.2, 0, 0], [-0.1, 0.1, 0, -1e-15], [0.1, 0.1, 0.3, -0.3], [0, 0, 0, 0]])
    np.testing.assert_allclose(cosines(beta, full), [1, -1, 0, 0], atol=1e-12)
    assert flips(beta, full).tolist() == [0, 2, 1, 0]
    assert cosines(beta[3:], beta[3:]).tolist() == [1]
