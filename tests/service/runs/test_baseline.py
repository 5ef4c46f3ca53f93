"""What methods ask for as stages, and what those say that they spent: counted, without a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ideal.config.config import Config
from service.outcome import Outcome
from service.reports.compare_report import passes_of
from service.runs.baseline import baseline
from service.stages import doge, doremi, merged
from service.stages.doge import Doge
from service.stages.doremi import DoReMi
from service.stages.merged import Merged
from service.stages.proxy import Here
from service.stages.reference import ReferenceLoss, losses_of, means
from service.stages.regmix import RegMix
from service.stages.retraining import TRAINED, Retraining, train_here
from service.stages.sft import Sft
from service.store.layout import MODEL
from service.store.stage import Record, Stage
from tests.ideal.counted import counted
from tests.service.made import Told, silent

SETS = ["math", "chat"]
CPU = torch.device("cpu")


@pytest.fixture
def config(config: Config) -> Config:
    return config.model_copy(update={"sft": config.sft.model_copy(update={"batch_examples": 6})})


def inputs(base: Path, data: Path) -> dict[str, Record[Any]]:
    return {
        "base": Record("model", "theta", base, {}, 1.0, fresh=False),
        "data": Record("data", "data", data, {}, 1.0, fresh=False),
    }


@pytest.mark.parametrize("kind", ["doremi", "doge", "merged"])
def test_proxies_record_what_they_spend(config: Config, base: Path, data: Path, kind: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"sft": config.sft, "volumes": {"math": 12, "chat": 6}, "seed": 0, **inputs(base, data)}
    here: Any = Here(config.resources, silent)  # type: ignore[arg-type]
    theta = given["base"]
    shares = [[0.5, 0.5], [1.0, 0.0], [0.2, 0.8]]
    calls: dict[str, Callable[[], Mapping[str, Any]]] = {
        "doremi": lambda: doremi.weights(DoReMi(rate=1.0, smoothing=0.001, reference=theta, **given), tmp_path, here),
        "doge": lambda: doge.weights(Doge(drive=1.0, wanted=[0.5, 0.5], **given), tmp_path, here),
        "merged": lambda: merged.losses(Merged(models=[theta, theta], shares=shares, precision="fp32", **given), here),
    }
    with counted() as spent:
        result = calls[kind]()
    assert spent.passes > 0
    assert passes_of(Record(kind, "x", tmp_path, result, 1.0, fresh=True)) == spent.passes


def test_reference_losses_cost_their_input_tokens(base: Path, data: Path) -> None:
    from ideal.model.base import load_model

    model = load_model(base / MODEL, torch.float32)
    with counted() as spent:
        result = means(losses_of(model, data, SETS, CPU, 64, silent), data)  # type: ignore[arg-type]
    assert passes_of(Record("reference", "x", data, result, 1.0, fresh=True)) == spent.passes
    assert spent.passes > sum(row["tokens"] for row in result.values())


def test_a_retraining_costs_its_training_and_its_losses(config: Config, base: Path, data: Path) -> None:
    volumes = {"math": 7, "chat": 3}
    stage = Retraining(sft=config.sft, averaged=0.0, volumes=volumes, seed=0, keep=False, **inputs(base, data))
    with counted() as spent:
        result = train_here(stage, None, config.resources, silent)  # type: ignore[arg-type]
    assert passes_of(Record("retraining", "x", data, result, 1.0, fresh=True)) == spent.passes
    assert result[TRAINED]["passes"] == 3 * result[TRAINED]["tokens"]


def test_a_set_may_be_called_as_the_costs_are() -> None:
    rows = {"passes": {"loss": 1.0, "tokens": 1, "passes": 7}, "other": {"loss": 1.0, "tokens": 1, "passes": 4}}
    assert passes_of(Record("reference", "x", Path(), rows, 1.0, fresh=True)) == 11


def followed(config: Config, data: Path, folder: Path, method: str, **settings: Any) -> tuple[Told, Outcome]:
    """A run of a method whose stages only say what they were asked for.

    After SFT a reference set's loss is that of its domain's shortfall; after a short training it falls with the root of
    the domain's share, `math`'s faster.
    """

    def answer(stage: Stage[Any], place: Path) -> Mapping[str, Any]:
        match stage:
            case Sft():
                return {"tokens": 10, "passes": 30, "volumes": stage.volumes}
            case ReferenceLoss():
                volumes = stage.model.result.get("volumes", dict.fromkeys(SETS, 0))
                losses = {n: {"loss": 2 - volume / 18, "tokens": 9, "passes": 5} for n, volume in volumes.items()}
                losses["math"]["loss"] += 2 * volumes["chat"] / 18
                return losses
            case Retraining():
                shares = {name: volume / sum(stage.volumes.values()) for name, volume in stage.volumes.items()}
                return {n: {"loss": 2 - (1 + (n == "math")) * x**0.5, "tokens": 9} for n, x in shares.items()}
            case RegMix():
                return stage.run(place, Quiet())  # type: ignore[arg-type]
        if stage.kind == "examples":
            return {name: {part: {"rows": 24, "rejected": {}} for part in ("train", "reference")} for name in SETS}
        if stage.kind == "data":
            for file in data.iterdir():
                (place / file.name).write_bytes(file.read_bytes())
            account = {"train": {"rows": 24, "used": 24}}
            row = {"pool": 24, "reference": 12, "tokens_per_example": 4.0, "account": account, "content": "same"}
            return dict.fromkeys(SETS, row)
        return {"value": 0.5}

    methods = config.methods.model_copy(update=settings)
    run = Told(folder, answer)
    return run, baseline(config.model_copy(update={"method": method, "methods": methods}), run)


class Quiet:
    progress = staticmethod(silent)


def test_the_base_model_is_scored_untrained(config: Config, data: Path, tmp_path: Path) -> None:
    run, outcome = followed(config, data, tmp_path, "base")
    (only,) = outcome.iterations
    assert only.sft.kind == "model"
    assert not run.names("sft")
    assert only.volumes == {"math": 0, "chat": 0}
    assert only.loss == 2
    assert outcome.search == []
    assert outcome.stopped == "the base model is scored, untrained"


def test_leaving_one_out_costs_the_trainings_that_it_doesnt_take(config: Config, data: Path, tmp_path: Path) -> None:
    _, outcome = followed(config, data, tmp_path, "leave_one_out")
    assert outcome.equilibrium.volumes == {"math": 18, "chat": 0}
    assert sorted(record.kind for record in outcome.search) == ["reference", "reference", "sft"]
    assert sum(map(passes_of, outcome.search)) == 30 + 2 * 2 * 5


@pytest.mark.parametrize("regressor", ["lightgbm", "ridge"])
def test_what_regmix_finds_is_a_stage(config: Config, data: Path, tmp_path: Path, regressor: str) -> None:
    """So that a replay of the records needs no regression; each regressor has its own, from the same runs."""
    _, outcome = followed(config, data, tmp_path, "regmix", regmix_regressor=regressor)
    (found,) = [record for record in outcome.search if record.kind == "regmix"]
    assert sum(found.result["shares"]) == pytest.approx(1)
    assert outcome.equilibrium.volumes["math"] == pytest.approx(18 * 0.8, abs=3)  # 4 : 1, where 2√x + √(1-x) is largest
    assert passes_of(found) == 0
