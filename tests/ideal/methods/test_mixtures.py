"""Every method keeps the total and the limits; the simple ones are what their names say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ideal.config.config import Config
from ideal.config.file import parse
from ideal.errors import BadInput
from ideal.methods import METHODS, merge, regmix
from ideal.methods.problem import Problem, fill
from ideal.methods.regression import REGRESSORS, boosted, ridge

VOLUMES = {"math": 60, "code": 30, "chat": 10}


def problem(**settings: Any) -> Problem:
    def source(seed: int) -> dict[str, Any]:
        return {"reasoning_gym": "chain_sum", "size": 80, "seed": seed}

    domains = [
        {"name": name, "volume": volume, "train": source(1000 * n), "reference": source(1000 * n + 500)}
        for n, (name, volume) in enumerate(VOLUMES.items())
    ]
    benchmarks = [{"name": "sums", "reasoning_gym": "chain_sum", "size": 4, "seed": 9000}]
    tree = {"name": "t", "domains": domains, "benchmarks": benchmarks, **settings}
    config: Config = parse(tree, "test", Path("/nowhere"))
    lengths, references = {"math": 2.0, "code": 4.0, "chat": 8.0}, {"math": 100, "code": 200, "chat": 100}
    return Problem(config, VOLUMES, dict.fromkeys(VOLUMES, 80), lengths, references)


class Losses:
    """Stages whose losses are known: a domain's falls with its share, and `chat` is worth nothing to anyone."""

    def __init__(self, given: Problem | None = None) -> None:
        self.asked: list[dict[str, int]] = []
        self.problem = given or problem()

    def of(self, shares: Sequence[float]) -> dict[str, float]:
        math, code, _ = shares
        return {"math": 2 - math, "code": 2 - 0.8 * np.sqrt(code), "chat": 1.0}

    def trained(self, volumes: Mapping[str, int]) -> dict[str, int]:
        self.asked.append(dict(volumes))
        return dict(volumes)

    def losses(self, model: Mapping[str, int]) -> dict[str, float]:
        return self.of(np.array(list(model.values())) / sum(model.values()))

    def short(self, mixtures: Sequence[Mapping[str, int]]) -> list[dict[str, float]]:
        return [self.losses(each) for each in mixtures]

    def regmix(self, mixtures: Sequence[Mapping[str, int]]) -> list[float]:
        return regmix.optimum(self.problem, mixtures, self.short(mixtures))

    def merged(self, models: Sequence[Any], shares: Sequence[Sequence[float]]) -> list[dict[str, float]]:
        return [self.of(each) for each in shares]

    def doremi(self, reference: Any) -> dict[str, float]:
        assert reference == VOLUMES
        return {"math": 0.2, "code": 0.4, "chat": 0.4}

    def doge(self) -> dict[str, float]:
        return {"math": 0.2, "code": 0.4, "chat": 0.4}


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("seed", range(3))
def test_the_total_is_kept(method: str, seed: int) -> None:
    given_problem = problem(seed=seed, method=method, methods={"domain": "code", "regmix_regressor": "ridge"})
    chosen = METHODS[method](given_problem, Losses(given_problem))
    assert list(chosen) == list(VOLUMES)
    assert sum(chosen.values()) == (0 if method == "base" else 100)
    assert METHODS[method](given_problem, Losses(given_problem)) == chosen


def test_the_simple_ones() -> None:
    def chosen(method: str, **settings: Any) -> dict[str, int]:
        return METHODS[method](problem(**settings), Losses())

    assert chosen("joint") == VOLUMES
    assert chosen("uniform") == {"math": 34, "code": 33, "chat": 33}
    assert chosen("specific", methods={"domain": "chat"}) == {"math": 0, "code": 0, "chat": 100}
    drawn = [tuple(chosen("random", seed=seed).values()) for seed in range(20)]
    assert len(set(drawn)) == 20
    assert np.mean(drawn, 0) == pytest.approx(list(VOLUMES.values()), abs=15)


def test_random_mixtures_stay_near_d0_where_they_are_concentrated() -> None:
    drawn = problem(methods={"concentration": 1000.0}).around(50, "x")
    assert drawn.std(0).max() < 0.02
    assert drawn.mean(0) == pytest.approx([0.6, 0.3, 0.1], abs=0.01)


def test_shares_of_tokens_become_examples_by_their_lengths() -> None:
    assert METHODS["doremi"](problem(), Losses()) == {"math": 40, "code": 40, "chat": 20}
    assert METHODS["doge"](problem(), Losses()) == {"math": 40, "code": 40, "chat": 20}


def test_doremis_reference_is_joint_sft_and_merges_models_are_the_specific_ones() -> None:
    stages = Losses()
    METHODS["doremi"](problem(), stages)
    assert stages.asked == [VOLUMES]
    stages = Losses()
    METHODS["merge"](problem(), stages)
    assert stages.asked == [{name: 100 * (name == domain) for name in VOLUMES} for domain in VOLUMES]


def test_merge_takes_its_best_candidate() -> None:
    tried = merge.candidates(problem())
    assert len(tried) == 32
    assert tried.sum(1) == pytest.approx(1)
    assert tried[0] == pytest.approx([0.6, 0.3, 0.1])
    assert tried[1] == pytest.approx(1 / 3)
    best = min(tried.tolist(), key=lambda shares: problem().objective(Losses().of(shares)))
    assert METHODS["merge"](problem(), Losses()) == problem().mixture(best)


def test_an_average_of_models() -> None:
    model = nn.Linear(2, 1)
    parts = [{"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([0.0])}]
    parts.append({"weight": torch.tensor([[3.0, -2.0]]), "bias": torch.tensor([4.0])})
    merge.average(model, parts, [0.25, 0.75])
    assert model.weight.tolist() == [[2.5, -1.0]]
    assert model.bias.tolist() == [3.0]


def test_one_domain_is_left_out_and_the_others_are_equal() -> None:
    """Without `chat`, worth nothing to anyone, the losses are lowest."""
    stages = Losses()
    assert METHODS["leave_one_out"](problem(), stages) == {"math": 50, "code": 50, "chat": 0}
    without_math, without_code = {"math": 0, "code": 50, "chat": 50}, {"math": 50, "code": 0, "chat": 50}
    assert stages.asked == [without_math, without_code, {"math": 50, "code": 50, "chat": 0}]


def test_methods_minimise_what_the_config_asks_for() -> None:
    """`code` has half of the reference tokens, so by tokens more of it is worth more than by sets."""
    micro = problem(equilibrium={"objective": "micro"})
    assert problem().objective({"math": 1.0, "code": 2.0, "chat": 3.0}) == pytest.approx(2)
    assert micro.objective({"math": 1.0, "code": 2.0, "chat": 3.0}) == pytest.approx((100 + 400 + 300) / 400)
    for method in ("merge", "regmix"):
        ridge = {"regmix_regressor": "ridge"}
        macro, tokens = problem(methods=ridge), problem(methods=ridge, equilibrium={"objective": "micro"})
        assert METHODS[method](tokens, Losses(tokens))["code"] > METHODS[method](macro, Losses(macro))["code"]


def test_regmix_tries_mixtures_far_from_d0() -> None:
    """The authors' prior: shares ∝ √D0 in the mean, most runs nearly of one domain, and some of all."""
    drawn = regmix.drawn(problem(), 4000, "x")
    flat = np.sqrt([0.6, 0.3, 0.1])
    assert drawn.sum(1) == pytest.approx(1)
    assert drawn.mean(0) == pytest.approx(flat / flat.sum(), abs=0.03)
    assert 0.3 < np.mean(drawn.max(1) > 0.95) < 0.7
    assert np.mean(drawn.min(1) > 0.1) > 0.02


def test_regmixs_optimum_is_within_the_limits() -> None:
    """A pool of 80 in a total of 100: `math` alone is the best, and more than 0.8 of it isn't to be had."""
    given_problem = problem(equilibrium={"max_copies": 1.0}, methods={"regmix_regressor": "ridge"})
    mixtures = [{"math": m, "code": 25 - m, "chat": 0} for m in range(26)]
    losses = [{"math": 2 - m / 25, "code": 1.0, "chat": 1.0} for m in range(26)]
    assert 0.7 < regmix.optimum(given_problem, mixtures, losses)[0] <= 0.8


@pytest.mark.parametrize("regressor", sorted(REGRESSORS))
def test_regmix_finds_what_its_runs_show(regressor: str) -> None:
    given_problem = problem(methods={"regmix_regressor": regressor})
    chosen = METHODS["regmix"](given_problem, Losses(given_problem))
    assert chosen["chat"] <= (5 if regressor == "ridge" else 15)  # worth nothing
    best = max(np.linspace(0, 1, 101), key=lambda math: math + 0.8 * np.sqrt(1 - math))
    assert chosen["math"] == pytest.approx(100 * best, abs=6 if regressor == "ridge" else 15)


def test_boosted_trees_predict_from_as_few_runs_as_there_are() -> None:
    """LightGBM's own smallest leaf of 20 would make a constant of 32 runs."""
    random = np.random.default_rng(0)
    shares, asked = random.dirichlet(np.ones(3), 32), random.dirichlet(np.ones(3), 200)
    truth = 2 - shares[:, :1] + 0.01 * random.normal(size=(32, 1))
    found = boosted(shares, truth, asked)[:, 0]
    assert np.corrcoef(found, 2 - asked[:, 0])[0, 1] > 0.95
    noise = boosted(shares, random.normal(size=(32, 1)), asked)
    assert noise.std() < 0.5


def test_ridge_predicts_and_ignores_noise() -> None:
    random = np.random.default_rng(0)
    shares, asked = random.dirichlet(np.ones(4), 40), random.dirichlet(np.ones(4), 100)

    def truth(x: np.ndarray) -> np.ndarray:
        return np.stack([3 - x[:, 0] - 0.5 * np.sqrt(x[:, 1]), np.full(len(x), 2.0)], 1)

    assert ridge(shares, truth(shares), asked) == pytest.approx(truth(asked), abs=1e-3)
    noise = truth(shares) + np.array([0.0, 0.1]) * random.normal(size=(40, 2))
    found = ridge(shares, noise, asked)
    assert found[:, 1].std() < 0.05  # nothing but noise: nearly its mean everywhere


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda shares: sum(shares) > 0),
    st.integers(20, 100),
)
def test_volumes_fill_up_in_proportion_within_their_limits(shares: list[float], total: int) -> None:
    low, high = np.full(len(shares), 1.0), np.linspace(50, 90, len(shares))
    filled = fill(np.array(shares), total, low, high)
    assert filled.sum() == pytest.approx(total)
    assert (filled >= low - 1e-6).all()
    assert (filled <= high * (1 + 1e-6)).all()
    free = [n for n in range(len(shares)) if low[n] + 1e-3 < filled[n] < high[n] - 1e-3 and shares[n] > 1e-6]
    ratios = [filled[n] / shares[n] for n in free]
    assert ratios == pytest.approx(ratios[:1] * len(ratios), rel=1e-4)


def test_limits_that_cant_be_met_are_refused() -> None:
    with pytest.raises(BadInput, match="2 to 80 examples, D0 has 100"):
        fill(np.ones(2), 100, np.ones(2), np.full(2, 40.0))
