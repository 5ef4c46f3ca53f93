"""The name of a tiny stage of every kind, so that nobody changes what a stage is named by, or its result, unaware.

A stage that goes by another name is computed again by every user who had it. Where that is meant, write the new names
here; where a stage's result changes and its name doesn't, raise its ``version``, and this file with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ideal.config.config import InfluenceConfig, SftConfig
from ideal.config.inputs import BenchmarkConfig, DomainConfig, ModelConfig, Source
from service.stages import base_model, benchmark, data, examples
from service.stages.base_model import BaseModel
from service.stages.benchmark import Benchmark
from service.stages.data import Data
from service.stages.doge import Doge
from service.stages.doremi import DoReMi
from service.stages.examples import Examples
from service.stages.influence import Influence
from service.stages.merged import Merged
from service.stages.prediction import Prediction
from service.stages.reference import ReferenceLoss
from service.stages.regmix import RegMix
from service.stages.retraining import Retraining
from service.stages.sft import Sft
from service.store.stage import Identified, Record, Stage

SFT = SftConfig(precision="fp32")
INFLUENCE = Identified(InfluenceConfig(precision="fp32"), InfluenceConfig(precision="fp32").of_the_table())
VOLUMES = {"math": 12, "chat": 6}
ASKED = BenchmarkConfig(name="sums", reasoning_gym="chain_sum", size=4, seed=4000)
DOMAINS = [
    DomainConfig(
        name=name,
        volume=6,
        train=Source(reasoning_gym="chain_sum", size=24, seed=seed),
        reference=Source(reasoning_gym="chain_sum", size=12, seed=seed + 1000),
    )
    for name, seed in (("math", 0), ("chat", 2000))
]


def of(kind: str) -> Record[Any]:
    return Record(kind, f"a-{kind}", Path(), {}, 0.0, fresh=False)


def checksum(path: Path) -> str:
    raise AssertionError("no stage here reads a file")


BASE, DATA, THETA = of("model"), of("data"), of("sft")
PROXY: dict[str, Any] = {"sft": SFT, "volumes": VOLUMES, "seed": 0, "base": BASE, "data": DATA}
STAGES: dict[str, tuple[Stage[Any], str]] = {
    "model": (
        BaseModel(model=base_model.identified(ModelConfig(source="someone/model", revision="main"), checksum)),
        "c313fb9f428d2d4a8aaf",
    ),
    "examples": (
        Examples(domains=examples.identified(DOMAINS, checksum), max_tokens=256, base=BASE),
        "f488b849f5ed4c44f794",
    ),
    "data": (Data(benchmarks=data.identified([ASKED], checksum), examples=of("examples")), "f8c0d51beb13e55a333e"),
    "sft": (Sft(averaged=0.5, **PROXY), "53d546face24526034f4"),
    "reference": (ReferenceLoss(precision="fp32", model=THETA, data=DATA), "b93e2a83cc1f91e94f13"),
    "influence": (
        Influence(influence=INFLUENCE, lora=None, volumes=VOLUMES, seed=0, model=THETA, data=DATA),
        "6b06711abccf2422cb8c",
    ),
    "benchmark": (
        Benchmark(benchmark=benchmark.identified(ASKED, checksum), max_tokens=256, seed=0, model=THETA),
        "6066a2d5146878f36c77",
    ),
    "retraining": (Retraining(averaged=0.0, keep=False, **PROXY), "addb6c7dfc177b016704"),
    "prediction": (
        Prediction(influence=INFLUENCE, volumes=VOLUMES, seed=0, trained=of("retraining"), data=DATA),
        "64cd40844f8f6ba7c6ad",
    ),
    "doremi": (DoReMi(rate=1.0, smoothing=0.001, reference=THETA, **PROXY), "efbed79a94e6e5d5d7a3"),
    "doge": (Doge(drive=1.0, wanted=[0.5, 0.5], **PROXY), "5dabce45bf107b3a048a"),
    "merged": (
        Merged(models=[THETA, THETA], shares=[[0.5, 0.5]], precision="fp32", **PROXY),
        "16b3fce03c6e8f1ef2ab",
    ),
    "regmix": (
        RegMix(problem=Identified(None, {"seed": 0}), mixtures=[VOLUMES], runs=[of("retraining")]),  # type: ignore[arg-type]
        "714d3299dc107f6eeb3e",
    ),
}


@pytest.mark.parametrize("kind", STAGES)
def test_a_stages_name_is_what_it_was(kind: str) -> None:
    stage, name = STAGES[kind]
    assert stage.kind == kind
    assert stage.fingerprint == name, f"stages of the kind `{kind}` go by another name now: see above what to do"


def test_no_kind_is_left_out() -> None:
    def kinds(of: type[Stage[Any]]) -> set[str]:
        return {kind for each in of.__subclasses__() for kind in ({each.kind} | kinds(each))}

    assert {kind for kind in kinds(Stage) if kind not in ("another",)} == set(STAGES)
