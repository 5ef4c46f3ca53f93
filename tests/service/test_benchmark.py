"""Benchmarks shared out to several engines give what one gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from ideal.config import Config, LoraConfig
from ideal.config_inputs import BenchmarkConfig
from service.benchmark import Benchmarks, dealt, fits_all
from service.benchmark import engines as engines_of
from service.cluster import Cluster

SIZES = {"a": 6, "b": 3, "c": 2}


def benchmark(name: str, size: int, **more: Any) -> BenchmarkConfig:
    return BenchmarkConfig(
        name=name, reasoning_gym="chain_sum", size=size, seed=size, options={"min_terms": 2}, max_new_tokens=4, **more
    )


def test_every_benchmark_goes_to_one_engine_and_none_is_idle() -> None:
    all_three = [benchmark(name, size) for name, size in SIZES.items()]
    assert [[b.name for b in part] for part in dealt(all_three, 2)] == [["a"], ["b", "c"]]
    assert [[b.name for b in part] for part in dealt(all_three, 9)] == [["a"], ["b"], ["c"]]
    assert dealt([benchmark("a", 9, limit=1), *all_three[1:]], 2)[0][0].name == "b", "a limit counts"


def test_runs_share_an_engine_where_nothing_of_it_differs(config: Config) -> None:
    def changed(**update: Any) -> Config:
        return config.model_copy(update=update)

    assert fits_all([config, changed(seed=7, method="uniform")])
    assert not fits_all([config, changed(allow_code_execution=True)])
    assert not fits_all([config, changed(benchmarks=[benchmark("a", 6)])])
    for update in ({"precision": "fp32"}, {"lora": LoraConfig()}):
        assert not fits_all([config, changed(sft=config.sft.model_copy(update=update))])


@pytest.mark.usefixtures("ray_session")
def test_two_engines_score_as_one(config: Config, base: Path, tmp_path: Path) -> None:
    update = {
        "benchmarks": [benchmark(name, size) for name, size in SIZES.items()],
        "resources": config.resources.model_copy(update={"vllm_memory": 0.125}),
    }
    config = config.model_copy(update=update)
    found = []
    for engines in (1, 2):
        cluster = Cluster(2, 0, 1, sft_workers=1, sft_cpus=2, influence_workers=1, benchmark_workers=engines)
        made = Benchmarks(config, cluster)
        try:
            found.append(made.score(tmp_path, checkpoint=base, progress=lambda *_: None))  # type: ignore[arg-type]
        finally:
            made.release()
        if engines == 1:
            shared = engines_of(config, cluster)
            for _ in range(2):  # as two runs of a sweep
                run = Benchmarks(config, cluster, shared)
                found.append(run.score(tmp_path, checkpoint=base, progress=lambda *_: None))  # type: ignore[arg-type]
                run.release()
            ray.kill(shared[0])
    assert found[0] == found[1] == found[2] == found[3]
    assert list(found[1]) == list(SIZES)
    assert {name: score["items"] for name, score in found[1].items()} == SIZES
