"""What stages say that they spent is what their models pass over, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ideal.config.config import InfluenceConfig, SftConfig
from ideal.costs import TRAINING, of_influence
from ideal.data.examples import ExampleSet
from ideal.influence.in_process import influence_tables
from ideal.influence.sampled import Sampled
from ideal.influence.table import split
from ideal.methods import doge, doremi
from ideal.methods.proxy import Stepped
from ideal.model.base import load_model
from ideal.training.trainer import Trainer, train
from tests.ideal.counted import counted
from tests.ideal.made import MLP, example_set, llama
from tests.tiny import make_model

CPU = torch.device("cpu")
SETS = [example_set(n, seed) for seed, n in enumerate((7, 5, 4, 6))]


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "identity", "joint": False},
        {"solver": "adam", "joint": True},
        {"solver": "kfac", "joint": False, "fisher": "sampled"},
        {"solver": "kfac", "joint": False, "fisher": "empirical"},
        {"solver": "kfac", "joint": True, "curvature_examples": 4},
        {"solver": "kfac", "joint": True},
        {"solver": "ekfac", "joint": False},
        {"solver": "ekfac", "joint": True, "fisher": "empirical"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_influence_costs_what_its_formula_says(settings: dict[str, Any]) -> None:
    model, chosen = llama(), InfluenceConfig.model_validate({"blocks": 2, "examples": 2, **settings})
    blocks = [
        block
        for number, (found, weight) in enumerate(zip(SETS, (0.3, 0.7, 0.0, 0.0), strict=True))
        for block in split(str(number), found, range(len(found)), 2, weight)
    ]
    own = {f"{layer}.weight": torch.rand_like(model.get_parameter(f"{layer}.weight")) + 0.5 for layer in MLP}
    with counted() as spent:
        influence_tables(model, MLP, Sampled(blocks, 2, chosen, own, 0, 64, CPU), [chosen.solver])
    assert spent.passes == of_influence(blocks, 2, chosen)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "m", layers=1)


def trainer(base: Path) -> Trainer:
    return Trainer(base, SftConfig(precision="fp32", batch_examples=6, learning_rate=3e-3), CPU, 64)


def test_training_costs_three_passes_of_every_token(base: Path) -> None:
    proxy = trainer(base)
    with counted() as spent:
        tokens = sum(log.tokens for log in train(proxy, {"a": SETS[0], "b": SETS[1]}, {"a": 9, "b": 3}, 0))
    assert spent.passes == TRAINING * tokens


@pytest.mark.parametrize("method", ["doremi", "doge"])
def test_proxies_cost_what_their_steps_say(base: Path, method: str) -> None:
    pools: dict[str, ExampleSet] = {"a": SETS[0], "b": SETS[1]}
    references = {"a": SETS[2], "b": SETS[3]}
    runs: dict[str, Callable[[], Iterator[Stepped]]] = {
        "doremi": lambda: doremi.weights(trainer(base), load_model(base, torch.float32, CPU), pools, 18, 0, 1.0, 1e-3),
        "doge": lambda: doge.weights(trainer(base), pools, references, np.array([0.5, 0.5]), 18, 0, 60.0),
    }
    with counted() as spent:
        steps = list(runs[method]())
    assert spent.passes == sum(step.passes for step in steps)
