"""DoReMi and DOGE: one step by hand, gradients against autograd, and domains that must rise, fall or stay equal."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ideal.config.config import SftConfig
from ideal.data.batches import Item, collate
from ideal.data.examples import ExampleSet
from ideal.methods import doge, doremi
from ideal.methods.proxy import moved, per_token, steps, tokens
from ideal.model.base import load_model, supervised_logits, token_losses
from ideal.training.trainer import Step, Trainer
from tests.ideal.made import example_set
from tests.tiny import make_model

CPU = torch.device("cpu")
CONFIG = SftConfig(precision="fp32", batch_examples=9, learning_rate=3e-3, epochs=1)
Sets = dict[str, ExampleSet]
POOLS = {"a": example_set(20, 1, vocabulary=300), "b": example_set(9, 2, vocabulary=300, longest=20)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "m", layers=1)


def trainer(base: Path, **settings: float | str) -> Trainer:
    return Trainer(base, CONFIG.model_copy(update=settings), CPU, 64)


def test_one_step_of_weights_by_hand() -> None:
    # softmax(log ½ + (log 3, 0)) = (¾, ¼); a tenth of it spread: 0.9·¾ + 0.05
    assert moved(np.array([0.5, 0.5]), np.array([math.log(3), 0.0])) == pytest.approx([0.75, 0.25])
    assert moved(np.array([0.5, 0.5]), np.array([math.log(3), 0.0]), 0.1) == pytest.approx([0.725, 0.275])
    assert moved(np.array([0.75, 0.25]), np.array([0.0, math.log(3)])) == pytest.approx([0.5, 0.5])
    assert moved(np.array([0.5, 0.5]), np.array([2000.0, 0.0]), 1e-3) == pytest.approx([0.9995, 0.0005])


def test_doges_scores_by_hand() -> None:
    gradients = torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.0, 0.0], [-3.0, 0.0]])  # norms 5, 1, 1, 3: mean 2.5
    wanted = torch.tensor([2.0, 1.0])  # products 10, 1, 2, -6
    assert doge.scores(gradients, wanted, 0.1) == pytest.approx([0.4, 0.04, 0.08, 0.0], rel=1e-5)
    assert doge.scores(gradients, 10 * wanted, 0.1) == pytest.approx([0.5, 0.4, 0.5, 0.0], rel=1e-5)  # at most 5·lr


def test_every_batch_holds_every_domain_and_the_steps_are_sfts() -> None:
    sets = {name: example_set(size, n) for n, (name, size) in enumerate({"a": 20, "b": 9, "c": 4, "d": 50}.items())}
    made = list(steps(sets, 100, CONFIG, seed=0))
    assert [step.number for step, _ in made] == list(range(12))
    for _, batch in made:
        assert sum(map(len, batch)) == 9
        assert {len(part) for part in batch} == {2, 3}
        assert tokens(batch) == collate([item for part in batch for item in part]).tokens
    each = [[ids.tolist() for _, batch in made for ids, _ in batch[k]] for k in range(4)]
    assert {len(seen) for seen in each} == {27}
    assert sorted(each[0][:20]) == sorted(ids.tolist() for ids, _ in sets["a"])
    assert sorted(each[2][:4]) == sorted(each[2][4:8]) == sorted(ids.tolist() for ids, _ in sets["c"])
    assert max(step.rate for step, _ in made) == pytest.approx(CONFIG.learning_rate)


def weighted_gradient(base: Path, batch: list[list[Item]], alpha: list[float]) -> torch.Tensor:
    """Of Σ_k α_k · (mean loss of domain k's tokens), by autograd."""
    model = load_model(base, torch.float32, CPU)
    means = [token_losses(supervised_logits(model, collate(items)), collate(items)).mean() for items in batch]
    sum(a * m for a, m in zip(alpha, means, strict=True)).backward()  # type: ignore[union-attr]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.ndim >= 2 and p.grad is not None])


@pytest.mark.parametrize("alpha", [[0.5, 0.5], [0.9, 0.1], [0.0, 1.0]])
def test_the_proxys_gradient_weighs_domains_and_not_their_tokens(base: Path, alpha: list[float]) -> None:
    batch = [[POOLS["a"][0], POOLS["a"][1], POOLS["a"][5]], [POOLS["b"][2], POOLS["b"][3]]]
    proxy = trainer(base)
    proxy.accumulate([item for items in batch for item in items], per_token(batch, np.array(alpha)))
    assert torch.allclose(proxy.flats["matrices"].gradient, weighted_gradient(base, batch, alpha), atol=1e-6, rtol=1e-4)


def test_the_excess_is_clipped_token_by_token(base: Path, tmp_path: Path) -> None:
    proxy, other = trainer(base).model, load_model(make_model(tmp_path / "other", layers=1, seed=7), torch.float32, CPU)
    items = [POOLS["a"][n] for n in range(6)]
    with torch.no_grad():
        batch = collate(items)
        apart = token_losses(supervised_logits(proxy, batch), batch) - token_losses(
            supervised_logits(other, batch), batch
        )
    assert float(apart.min()) < 0 < float(apart.max())
    assert doremi.excess(proxy, other, items, CPU, 40) == pytest.approx(float(apart.clamp(min=0).mean()), rel=1e-5)


def of_doremi(base: Path, reference: torch.nn.Module, pools: Sets, rate: float = 1.0) -> np.ndarray:
    return np.array([step.alpha for step in doremi.weights(trainer(base), reference, pools, 90, 0, rate, 1e-3)])


def of_doge(base: Path, pools: Sets, references: Sets, total: int, drive: float) -> np.ndarray:
    wanted = np.full(len(references), 1 / len(references))
    return np.array([each.alpha for each in doge.weights(trainer(base), pools, references, wanted, total, 0, drive)])


def test_identical_domains_keep_equal_weights(base: Path) -> None:
    same = dict.fromkeys(("a", "b"), example_set(1, 1, vocabulary=300))
    reference = make_model(base.parent / "other", layers=1, seed=7)
    found = of_doremi(base, load_model(reference, torch.float32, CPU), same)
    assert found == pytest.approx(np.full((10, 2), 0.5), abs=1e-3)
    found = of_doge(base, same, same, 90, 60.0)
    assert found == pytest.approx(np.full((10, 2), 0.5), abs=1e-3)


def test_doremi_leaves_a_domain_that_the_reference_learned_nothing_of(base: Path) -> None:
    learned = trainer(base)
    for number in range(20):
        learned.step(Step(number, [], 3e-3), [POOLS["a"][i] for i in range(20)])
    found = of_doremi(base, learned.model, POOLS)
    assert found[0][0] > 0.5
    assert found.mean(0)[0] > 0.7


def test_doge_leaves_a_domain_that_no_reference_set_wants(base: Path) -> None:
    """`b`'s gradients have nothing of `a`'s; only `a` is asked for."""
    found = of_doge(base, POOLS, {"a": POOLS["a"]}, 180, 60.0)
    assert found.mean(0)[0] > 0.8
    assert found[-1][0] > 0.9


def test_doges_drive_is_the_runs_whatever_its_steps(base: Path) -> None:
    """Where every step has one score, log α moves by drive · score/lr in all: twice the steps, half of each."""
    sets = {name: example_set(1, seed, vocabulary=300) for seed, name in enumerate("ab")}
    frozen = {"learning_rate": 1e-12, "warmup": 0.0, "decay": "constant"}
    ends = []
    for total in (90, 180):
        proxy, half = trainer(base, **frozen), np.array([0.5, 0.5])
        *_, last = doge.weights(proxy, sets, {"a": sets["a"], "b": sets["a"]}, half, total, 0, 0.5)
        ends.append(math.log(last.alpha[0] / last.alpha[1]))
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)
    assert ends[0] > 0.3


def test_doges_targets_are_clipped_one_by_one_and_summed(base: Path) -> None:
    """Two targets alike weigh twice as much as one of them; by tokens, each has its own weight."""
    sets = {name: example_set(1, seed, vocabulary=300) for seed, name in enumerate("ab")}
    frozen = {"learning_rate": 1e-12, "warmup": 0.0, "decay": "constant"}

    def moved_by(references: Sets, wanted: list[float]) -> float:
        *_, last = doge.weights(trainer(base, **frozen), sets, references, np.array(wanted), 90, 0, 0.1)
        return math.log(last.alpha[0] / last.alpha[1])

    one = moved_by({"a": sets["a"]}, [1.0])
    assert moved_by({"a": sets["a"], "again": sets["a"]}, [0.5, 0.5]) == pytest.approx(2 * one, rel=1e-3)
    assert moved_by({"a": sets["a"], "again": sets["a"]}, [1.0, 0.0]) == pytest.approx(2 * one, rel=1e-3)
    both = moved_by({"a": sets["a"], "b": sets["b"]}, [1.0, 0.0])
    assert both == pytest.approx(2 * one, rel=1e-3)


def test_doge_moves_along_its_weighted_gradients(base: Path) -> None:
    """The first step's weights are those of plain SGD's direction: AdamW's first step is its sign."""
    proxy = trainer(base, clip_norm=1e9)
    before = proxy.flats["matrices"].master.detach().clone()
    (first,) = islice(doge.weights(proxy, POOLS, POOLS, np.array([0.5, 0.5]), 90, 0, 60.0), 1)
    _, batch = next(steps(POOLS, 90, CONFIG, 0))
    assert first.passes == 2 * 3 * tokens(batch)
    gradient = weighted_gradient(base, batch, first.alpha.tolist())
    step = proxy.flats["matrices"].master.detach() - before
    large = gradient.abs() > 1e-3
    assert large.sum() > 100
    assert torch.equal(step[large].sign(), -gradient[large].sign())
