"""From influences to volumes: the rules, their limits, and what is decided."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from ideal.config.config import EquilibriumConfig
from ideal.equilibrium import limits, project, token_weights, update, values
from ideal.errors import BadInput

VOLUMES = [400, 120, 60, 25]
LENGTHS = [8.0, 100.0, 30.0, 3.5]
INFLUENCE = np.array([0.3, 0.9, -0.2, 0.5])
WIDE = [10_000] * 4
NONE = np.zeros(4)
SMALL = 1e-9


def step(influence=INFLUENCE, volumes=VOLUMES, pools=WIDE, lengths=LENGTHS, m=0.15, cloud=None, **settings):  # type: ignore[no-untyped-def]
    cloud = np.tile(influence, (20, 1)) if cloud is None else cloud
    config = EquilibriumConfig(**{"normalise": "largest", **settings})
    return update(influence, cloud, np.zeros(len(volumes)), volumes, pools, lengths, config, m, 0.9)


@pytest.mark.parametrize("dilution", [0.0, 0.5, 1.0])
def test_worth_of_an_example_is_the_numerical_derivative(dilution: float) -> None:
    """A step sums its T tokens' gradients and divides by T^c; the loss moves along it, by a per token of a domain."""
    usual = sum(v * t for v, t in zip(VOLUMES, LENGTHS, strict=True)) / sum(VOLUMES)

    def reduction(beta: np.ndarray) -> float:
        volumes = np.array(VOLUMES) * (1 + beta)
        tokens = volumes / volumes.sum() * LENGTHS
        return float(tokens @ INFLUENCE / tokens.sum() ** dilution * usual ** (dilution - 1))

    e, shares = values(INFLUENCE, NONE, VOLUMES, LENGTHS, "balanced", dilution), np.array(VOLUMES) / sum(VOLUMES)
    for j in range(4):
        h = 1e-6 * np.eye(4)[j]
        derivative = (reduction(h) - reduction(-h)) / 2e-6
        assert shares[j] * e[j] == pytest.approx(derivative, rel=1e-6, abs=1e-9)
    centred = INFLUENCE - token_weights(VOLUMES, LENGTHS) @ INFLUENCE
    assert not np.allclose(e / np.abs(e).max(), centred / np.abs(centred).max(), atol=0.1), "no lengths would show"


def test_noisy_domains_take_more_from_all_others() -> None:
    """AdamW's step is the sum of gradients by the root of the sum of their squares: the numerical derivative of that.

    Along two weights, in which the domains' squared gradients differ by factors of up to 100.
    """
    random = np.random.default_rng(0)
    gradients, squares = 1 + random.normal(size=(4, 2)), 10 ** random.uniform(-1, 1, (4, 2))
    direction, shares = np.array([0.7, 0.4]), np.array(VOLUMES) / sum(VOLUMES)

    def reduction(beta: np.ndarray) -> float:
        volumes = np.array(VOLUMES) * (1 + beta)
        tokens = volumes / volumes.sum() * LENGTHS
        return float(direction @ ((tokens @ gradients) / np.sqrt(tokens @ squares)))

    w = token_weights(VOLUMES, LENGTHS)
    x = direction / np.sqrt(w @ squares)  # what a unit of gradient is worth in each weight
    influence, crowded = gradients @ x, (squares / (w @ squares)) @ (x * (w @ gradients))
    e = values(influence, crowded - w @ crowded, VOLUMES, LENGTHS, "balanced", 0.5)
    plain = values(influence, NONE, VOLUMES, LENGTHS, "balanced", 0.5)
    moved = np.array([(reduction(h) - reduction(-h)) / 2e-6 for h in 1e-6 * np.eye(4)])
    moved /= np.sqrt(shares @ LENGTHS)  # the root of a step's tokens
    np.testing.assert_allclose(shares * e, moved, rtol=1e-5, atol=1e-8)
    assert abs(shares @ e) < SMALL
    assert np.abs(shares * plain - moved).max() > 0.1 * np.abs(moved).max(), "one number for all domains would show"


@pytest.mark.parametrize("dilution", [0.0, 0.5, 1.0])
def test_equal_lengths_give_the_plain_centred_influence(dilution: float) -> None:
    e = values(INFLUENCE, NONE, VOLUMES, [7.0] * 4, "balanced", dilution)
    np.testing.assert_allclose(e, INFLUENCE - np.array(VOLUMES) @ INFLUENCE / sum(VOLUMES))


def test_a_common_influence_moves_nothing() -> None:
    """The value of training longer has no part in it, under a plain mean (c = 1) or where all examples are as long;
    uncentred, every domain would grow."""
    assert np.abs(values(np.full(4, 0.8), NONE, VOLUMES, LENGTHS, "balanced", 1)).max() < SMALL
    raised, plain = (values(a, NONE, VOLUMES, LENGTHS, "balanced", 1) for a in (INFLUENCE + 5, INFLUENCE))
    np.testing.assert_allclose(raised, plain, atol=SMALL)
    equal = [7.0] * 4
    assert sum(step(np.full(4, 0.8) + 1e-15 * INFLUENCE, lengths=equal).volumes) == sum(VOLUMES)
    np.testing.assert_allclose(step(INFLUENCE + 5, lengths=equal).beta, step(lengths=equal).beta, atol=SMALL)


def test_where_tokens_are_not_divided_by_their_number_long_examples_are_worth_more() -> None:
    """Of domains whose tokens are worth the same, with steps that grow with √T: by half of what they are longer."""
    usual = np.array(VOLUMES) @ LENGTHS / sum(VOLUMES)
    found = values(np.full(4, 0.8), NONE, VOLUMES, LENGTHS, "balanced", 0.5)
    np.testing.assert_allclose(found, 0.4 * (np.array(LENGTHS) / usual - 1))


@pytest.mark.parametrize("lengths", [LENGTHS, [7.0] * 4])
def test_one_outlier_leaves_the_others_their_step(lengths: list[float]) -> None:
    """Divided by the mean, a domain of at least mean worth moves by m; the total is kept all the same."""
    found, e = step(lengths=lengths, normalise="mean"), values(INFLUENCE, NONE, VOLUMES, lengths, "balanced", 0.5)
    shares = np.array(VOLUMES) / sum(VOLUMES)
    by_hand = 0.15 * e / (shares @ np.abs(e))
    assert np.abs(by_hand).max() > 0.15, "nothing would meet its limit"
    lost = by_hand - found.beta
    free = np.abs(found.beta) < 0.15 - SMALL
    np.testing.assert_allclose(lost[free], lost[free][0], atol=1e-6)
    assert np.abs(found.beta).sum() > np.abs(step(lengths=lengths).beta).sum()
    assert sum(found.volumes) == sum(VOLUMES)


@pytest.mark.parametrize("lengths", [LENGTHS, [7.0] * 4])
def test_balanced_keeps_the_total(lengths: list[float]) -> None:
    found = step(lengths=lengths)
    e = values(INFLUENCE, NONE, VOLUMES, lengths, "balanced", 0.5)
    np.testing.assert_allclose(found.beta, 0.15 * e / np.abs(e).max(), atol=SMALL)
    assert abs(np.array(VOLUMES) @ found.beta) < SMALL
    assert sum(found.volumes) == sum(VOLUMES)
    assert np.abs(found.beta).max() == pytest.approx(0.15)
    np.testing.assert_allclose(found.volumes, np.array(VOLUMES) * (1 + np.array(found.beta)), atol=1)


def test_limits_keep_the_total_too() -> None:
    """A cap and a floor that bind: the others take over what is left, which clipping wouldn't do."""
    pools = [10_000, 31, 10_000, 10_000]
    free, found = step(m=0.5), step(m=0.5, pools=pools, floor=24)
    assert free.beta[1] > 4 * 31 / 120 - 1
    assert found.volumes[1] == 4 * 31
    assert min(found.volumes) >= 24
    assert abs(np.array(VOLUMES) @ found.beta) < 1e-6
    assert sum(found.volumes) == sum(VOLUMES)


def test_small_domains_may_grow_by_more_than_large_ones_shrink() -> None:
    """A small domain of great worth: with `growth` it takes in one step what the large ones are to give."""
    volumes, influence = [10, 100, 100], np.array([1.0, -0.05, -0.05])
    held, free = (step(influence, volumes, [1000] * 3, [4.0] * 3, m=0.8, normalise="mean", growth=g) for g in (1, 5))
    assert held.volumes == [18, 96, 96]
    assert free.volumes == [50, 80, 80]
    halved = step(influence, volumes, [1000] * 3, [4.0] * 3, m=0.4, normalise="mean", growth=5)
    assert halved.volumes == [30, 90, 90], "a retreat halves growth too"


def test_limits_hold_for_whole_volumes() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        volumes = random.integers(3, 40, 5).tolist()
        copies, floor, m = float(random.uniform(1, 3)), int(random.integers(1, 4)), float(random.uniform(0.05, 0.95))
        pools = [int(np.ceil(v / copies)) + int(random.integers(0, 3)) for v in volumes]
        for rule in ("balanced", "paper"):
            found = step(
                random.standard_normal(5), volumes, pools, [4.0] * 5, m, rule=rule, floor=floor, max_copies=copies
            )
            assert all(floor <= v <= copies * n for v, n in zip(found.volumes, pools, strict=True))
            assert all(abs(new - old) <= m * old + 1 for new, old in zip(found.volumes, volumes, strict=True))
            assert rule == "paper" or sum(found.volumes) == sum(volumes)


def test_a_mixture_outside_its_limits_is_refused() -> None:
    with pytest.raises(BadInput, match="floor and max_copies"):
        step(floor=26)
    with pytest.raises(BadInput, match="floor and max_copies"):
        step(pools=[99, 1000, 1000, 1000])
    low, high = limits([10], [3], EquilibriumConfig(max_copies=3.5), 0.9)
    assert (low[0], high[0]) == (-0.9, 0.0), "10 of at most 10.5 can't grow by a half"


def test_projection_is_the_nearest_point() -> None:
    """Against a general solver, on random problems with bounds that bind."""
    random = np.random.default_rng(1)
    bound = 0
    for _ in range(25):
        n = int(random.integers(2, 7))
        volumes, wanted = random.uniform(1, 50, n), random.uniform(-0.5, 0.5, n)
        low, high = -random.uniform(0, 0.4, n), random.uniform(0, 0.4, n)
        found = project(wanted, volumes, low, high)
        best = minimize(
            lambda b, volumes=volumes, wanted=wanted: volumes @ (b - wanted) ** 2,
            np.zeros(n),
            jac=lambda b, volumes=volumes, wanted=wanted: 2 * volumes * (b - wanted),
            bounds=list(zip(low, high, strict=True)),
            constraints={"type": "eq", "fun": lambda b, volumes=volumes: volumes @ b, "jac": lambda b, v=volumes: v},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert abs(volumes @ found) < SMALL * volumes.sum()
        assert (found >= low).all()
        assert (found <= high).all()
        np.testing.assert_allclose(found, best.x, atol=1e-5)
        bound += int(np.isclose(found, low).any() or np.isclose(found, high).any())
    assert bound > 10, "the bounds matter in these problems"


def test_the_papers_rule_lets_the_total_go() -> None:
    influence = np.abs(INFLUENCE)
    s = token_weights(VOLUMES, LENGTHS) * influence
    found = step(influence, rule="paper")
    np.testing.assert_allclose(found.beta, 0.15 * s / s.max())
    assert found.volumes == [round(v * (1 + b)) for v, b in zip(VOLUMES, found.beta, strict=True)]
    assert sum(found.volumes) > sum(VOLUMES)


def test_what_is_decided() -> None:
    """An interval on one side of 0 decides."""
    random = np.random.default_rng(2)
    influence = np.array([1.0, -1.0, 0.02, 0.0])
    cloud = influence + 0.2 * random.standard_normal((4000, 4))
    found = step(influence, [100] * 4, lengths=[5.0] * 4, cloud=cloud)
    assert found.decided == [True, True, False, False]
    assert found.low[0] == pytest.approx(np.quantile(cloud[:, 0] - cloud.mean(1), 0.05))
    assert found.high[0] == pytest.approx(np.quantile(cloud[:, 0] - cloud.mean(1), 0.95))


@pytest.mark.parametrize("domains", [4, 8])
def test_of_noise_alone_a_run_goes_on_as_often_as_it_may(domains: int) -> None:
    """Domains that differ by noise alone, and a cloud that knows their spread: `sure` is the share that stops.

    Single signs go on nearly always: some domain has one in 75 % of its resamples.
    """
    random, tried = np.random.default_rng(3), 300
    goes_on, by_signs = 0, 0
    for _ in range(tried):
        influence = random.standard_normal(domains)
        cloud = influence + random.standard_normal((500, domains))
        found = step(influence, [100] * domains, [1000] * domains, [5.0] * domains, cloud=cloud)
        goes_on += found.told(0.75)
        signs = (np.sign(cloud - cloud.mean(1, keepdims=True)) == np.sign(found.value)).mean(0)
        by_signs += (signs >= 0.75).any()
    assert 0.17 <= goes_on / tried <= 0.33
    assert by_signs / tried > 0.85


def test_a_run_goes_on_where_one_domain_stands_out() -> None:
    random = np.random.default_rng(3)
    for size, expected in ((0.0, (False, False)), (0.17, (True, False)), (1.0, (True, True))):
        influence = size * np.array([1.0, -1.0, 0.0, 0.0])
        cloud = influence + 0.1 * random.standard_normal((4000, 4))
        found = step(influence, [100] * 4, lengths=[5.0] * 4, cloud=cloud)
        assert (found.told(0.75), found.told(0.95)) == expected
    sure = step(INFLUENCE, cloud=np.tile(INFLUENCE, (200, 1)))
    assert sure.noise == pytest.approx(1 / 201), "no spread at all"
    assert step(np.zeros(4)).noise == 1


def test_change_is_relative_to_each_volume() -> None:
    found = step()
    expected = max(abs(new - old) / old for new, old in zip(found.volumes, VOLUMES, strict=True))
    assert found.change(VOLUMES) == expected
    assert step(np.zeros(4)).change(VOLUMES) == 0
