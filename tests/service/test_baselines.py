"""What methods ask for as stages, and what those say that they spent: counted, without a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ideal.config import Config
from service import proxies
from service.baselines import Baseline
from service.cluster import Cluster
from service.compare_report import passes_of
from service.files import MODEL
from service.mixtures import Iteration
from service.proxies import Work
from service.reference import losses_of, means
from service.retraining import TRAINED, Retrainer
from service.stages import Record, Stage
from tests.ideal.counted import counted

SETS = ["math", "chat"]
CPU = torch.device("cpu")
ALONE = Cluster(cpus=1, gpus=0, nodes=1, sft_workers=1, sft_cpus=1, influence_workers=1)


def silent(*state: Any) -> None:
    """No progress."""


@pytest.fixture
def work(config: Config, base: Path, data: Path) -> Work:
    sft = config.sft.model_copy(update={"precision": "fp32", "batch_examples": 6})
    influence = config.influence.model_copy(update={"precision": "fp32"})
    config = config.model_copy(update={"sft": sft, "influence": influence})
    return Work(config, ALONE, base, data, {"math": 12, "chat": 6}, silent)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["doremi", "doge", "merged"])
def test_proxies_record_what_they_spend(work: Work, kind: str, tmp_path: Path) -> None:
    calls: dict[str, Callable[[], dict[str, Any]]] = {
        "doremi": lambda: proxies._doremi(work, tmp_path, work.base),
        "doge": lambda: proxies._doge(work, tmp_path, [0.5, 0.5]),
        "merged": lambda: proxies._merged(work, [work.base, work.base], [[0.5, 0.5], [1.0, 0.0], [0.2, 0.8]]),
    }
    with counted() as spent:
        result = calls[kind]()
    assert spent.passes > 0
    assert passes_of(Record(kind, "x", tmp_path, result, 1.0, fresh=True)) == spent.passes


def test_reference_losses_cost_their_input_tokens(work: Work, base: Path, data: Path) -> None:
    from ideal.model import load_model

    model = load_model(base / MODEL, torch.float32)
    with counted() as spent:
        result = means(losses_of(model, data, SETS, CPU, 64, silent), data)  # type: ignore[arg-type]
    assert passes_of(Record("reference", "x", data, result, 1.0, fresh=True)) == spent.passes
    assert spent.passes > sum(row["tokens"] for row in result.values())


def test_a_retraining_costs_its_training_and_its_losses(work: Work, base: Path, data: Path) -> None:
    retrainer = Retrainer.__ray_metadata__.modified_class(base / MODEL, data, work.config)  # type: ignore[attr-defined]
    with counted() as spent:
        result = retrainer.retrain({"math": 7, "chat": 3}, 0, None, silent)
    assert passes_of(Record("retraining", "x", data, result, 1.0, fresh=True)) == spent.passes
    assert result[TRAINED]["passes"] == 3 * result[TRAINED]["tokens"]


def test_a_set_may_be_called_as_the_costs_are() -> None:
    rows = {"passes": {"loss": 1.0, "tokens": 1, "passes": 7}, "other": {"loss": 1.0, "tokens": 1, "passes": 4}}
    assert passes_of(Record("reference", "x", Path(), rows, 1.0, fresh=True)) == 11


class Recorded(Baseline):
    """Stages that only say what they were asked for; the loss of a reference set is that of a share's shortfall."""

    def __init__(self, config: Config, base: Path, data: Path) -> None:
        super().__init__(config, ALONE, None, None)  # type: ignore[arg-type]
        self.place = data
        self.theta = Record("model", "theta", base, {"bytes": 1}, 5.0, fresh=True)

    def base_model(self) -> Record:
        return self.theta

    def example_sets(self) -> Record:
        account = {"train": {"rows": 24, "used": 24}}
        found = {name: {"pool": 24, "reference": 12, "tokens_per_example": 4.0, "account": account} for name in SETS}
        return Record("data", "data", self.place, found, 1.0, fresh=True)

    def sft(self, volumes: dict[str, int], name: str) -> Record:
        return Record("sft", f"sft {volumes}", self.place, {"tokens": 10, "passes": 30, "volumes": volumes}, 1.0, True)

    def reference(self, trained: Record, name: str) -> Record:
        volumes = trained.result.get("volumes", dict.fromkeys(SETS, 0))
        losses = {name: {"loss": 2 - volume / 18, "tokens": 9, "passes": 5} for name, volume in volumes.items()}
        losses["math"]["loss"] += 2 * volumes["chat"] / 18
        return Record("reference", f"reference {trained.fingerprint}", self.place, losses, 1.0, True)

    def benchmark(self, current: Iteration) -> None:
        pass

    def _short(self, mixtures: Sequence[Mapping[str, int]]) -> list[Record]:
        """Each set's loss falls with its own share, `math`'s faster."""
        made = []
        for number, volumes in enumerate(mixtures):
            shares = {name: volume / sum(volumes.values()) for name, volume in volumes.items()}
            losses = {name: {"loss": 2 - (1 + (name == "math")) * x**0.5, "tokens": 9} for name, x in shares.items()}
            made.append(Record("retraining", f"run {number}", self.place, losses, 1.0, fresh=True))
        return made

    def stage(self, stage: Stage, name: str, work: Callable[[Path, Any], dict[str, Any]], attempts: int = 1) -> Record:
        return Record(stage.kind, stage.fingerprint, self.place, work(self.place, silent), 1.0, fresh=True)


def test_the_base_model_is_scored_untrained(work: Work, base: Path, data: Path) -> None:
    made = Recorded(work.config.model_copy(update={"method": "base"}), base, data)
    outcome = made.run()
    (only,) = outcome.iterations
    assert only.sft is made.theta
    assert only.volumes == {"math": 0, "chat": 0}
    assert only.loss == 2
    assert outcome.search == []
    assert outcome.stopped == "the base model is scored, untrained"


def test_leaving_one_out_costs_the_trainings_that_it_doesnt_take(work: Work, base: Path, data: Path) -> None:
    outcome = Recorded(work.config.model_copy(update={"method": "leave_one_out"}), base, data).run()
    assert outcome.equilibrium.volumes == {"math": 18, "chat": 0}
    assert sorted(record.kind for record in outcome.search) == ["reference", "reference", "sft"]
    assert sum(map(passes_of, outcome.search)) == 30 + 2 * 2 * 5


@pytest.mark.parametrize("regressor", ["lightgbm", "ridge"])
def test_what_regmix_finds_is_a_stage(work: Work, base: Path, data: Path, regressor: str) -> None:
    """So that a replay of the records needs no regression; each regressor has its own, from the same runs."""
    methods = work.config.methods.model_copy(update={"regmix_regressor": regressor})
    made = Recorded(work.config.model_copy(update={"method": "regmix", "methods": methods}), base, data)
    outcome = made.run()
    (found,) = [record for record in outcome.search if record.kind == "regmix"]
    assert sum(found.result["shares"]) == pytest.approx(1)
    assert outcome.equilibrium.volumes["math"] == pytest.approx(18 * 0.8, abs=3)  # 4 : 1, where 2√x + √(1-x) is largest
    assert passes_of(found) == 0
