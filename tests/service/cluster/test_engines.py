"""Benchmarks shared out to several engines give what one gives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from ideal.config.config import Config, LoraConfig
from ideal.config.inputs import BenchmarkConfig
from service.cluster.cluster import Cluster
from service.cluster.engines import Benchmarks, engines_needed, fits_all, longest_first
from service.cluster.engines import engines as engines_of
from tests.waiting import HANGS, until

SIZES = {"a": 6, "b": 3, "c": 2}


def benchmark(name: str, size: int, **more: Any) -> BenchmarkConfig:
    return BenchmarkConfig(
        name=name, reasoning_gym="chain_sum", size=size, seed=size, options={"min_terms": 2}, max_new_tokens=4, **more
    )


def test_the_longest_benchmark_is_first_and_no_engine_is_without(config: Config) -> None:
    all_three = [benchmark(name, size) for name, size in SIZES.items()]
    assert [b.name for b in longest_first(all_three[::-1])] == ["a", "b", "c"]
    assert [b.name for b in longest_first([benchmark("a", 9, limit=1), *all_three[1:]])] == ["b", "c", "a"]
    config = config.model_copy(update={"benchmarks": all_three})
    assert [engines_needed(config, Cluster(9, 0, 1, 1, 1, 1, benchmark_workers=n)) for n in (1, 2, 9)] == [1, 2, 3]


def test_runs_share_an_engine_where_nothing_of_it_differs(config: Config) -> None:
    def changed(**update: Any) -> Config:
        return config.model_copy(update=update)

    assert fits_all([config, changed(seed=7, method="uniform")])
    assert not fits_all([config, changed(allow_code_execution=True)])
    assert not fits_all([config, changed(benchmarks=[benchmark("a", 6)])])
    for update in ({"precision": "bf16"}, {"lora": LoraConfig()}):
        assert not fits_all([config, changed(sft=config.sft.model_copy(update=update))])


@ray.remote(num_cpus=0)
class Breaking:
    """Instead of an engine: the first of them doesn't live long."""

    def __init__(self, works: bool) -> None:
        self.works = works

    def node(self) -> str:
        return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    def score(self, *_: object) -> dict[str, Any]:
        if not self.works:
            raise ValueError("broken")
        return {"value": 0.5}


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("shared", [False, True])
def test_an_engine_that_broke_is_not_asked_again(
    config: Config, base: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    made: list[Any] = []

    def engines(*_: object) -> list[Any]:
        made.append(Breaking.remote(works=shared or bool(made)))  # type: ignore[attr-defined]
        return made[-1:]

    monkeypatch.setattr("service.cluster.engines.engines", engines)
    broken = [Breaking.remote(works=False)] if shared else []  # type: ignore[attr-defined]
    cluster = Cluster(2, 0, 1, sft_workers=1, sft_cpus=2, influence_workers=1)
    run, progress = Benchmarks(config, cluster, broken), None
    (benchmark,) = config.benchmarks
    with pytest.raises(ray.exceptions.RayTaskError):
        run.score(benchmark, checkpoint=base, seed=0, progress=progress)  # type: ignore[arg-type]
    for _ in range(2):
        assert run.score(benchmark, checkpoint=base, seed=0, progress=progress) == {"value": 0.5}  # type: ignore[arg-type]
    assert len(made) == (1 if shared else 2)
    run.release()
    until(lambda: is_gone(made[-1]))


def is_gone(actor: Any) -> bool:
    """Ray ends an actor after it was told to, and until then the actor answers."""
    try:
        ray.get(actor.node.remote())
    except ray.exceptions.RayActorError:
        return True
    return False


@pytest.mark.usefixtures("ray_session")
def test_two_engines_score_as_one(config: Config, base: Path) -> None:
    update = {
        "benchmarks": [benchmark(name, size) for name, size in SIZES.items()],
        "resources": config.resources.model_copy(update={"vllm_cpu_cache": 0.125, "wait_seconds": HANGS}),
        "sft": config.sft.model_copy(update={"precision": "fp32"}),
    }
    config = config.model_copy(update=update)
    one, two = (
        Cluster(2, 0, 1, sft_workers=1, sft_cpus=2, influence_workers=1, benchmark_workers=engines)
        for engines in (1, 2)
    )
    shared = engines_of(config, one)
    found = []

    def scores(made: Benchmarks, engines: int) -> dict[str, Any]:
        def score(each: BenchmarkConfig) -> dict[str, Any]:
            return made.score(each, checkpoint=base, seed=0, progress=lambda *_: None)  # type: ignore[arg-type]

        with ThreadPoolExecutor(engines) as pool:
            return dict(zip(SIZES, pool.map(score, config.benchmarks), strict=True))

    for cluster, engines in ((one, shared), (one, shared), (two, [])):  # the first are as two runs of a sweep
        if cluster is two:
            assert ray.get(shared[0].node.remote()), "a shared one outlives them"
            ray.kill(shared[0])
        made = Benchmarks(config, cluster, engines)
        try:
            found.append(scores(made, cluster.benchmark_workers))
            assert len(made._own) == (2 if cluster is two else 0), "they stay warm"
        finally:
            made.release()
    assert found[0] == found[1] == found[2]
    assert {name: score["items"] for name, score in found[1].items()} == SIZES
