"""Benchmarks by actors that each keep a vLLM engine warm and reload weights for each checkpoint.

Several engines share the benchmarks out. On CPU an engine holds no CPU of Ray's while it is idle, or SFT could never
have all of them; they are reserved for as long as it works. On GPU it holds its GPUs, and is given back before SFT
where SFT needs them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from ideal.benchmarks.evaluation import evaluate
from ideal.config import Config
from ideal.config_inputs import BenchmarkConfig
from ideal.lora import is_adapter
from service.cluster import Cluster, Reservation
from service.files import MODEL
from service.progress import Reporter
from service.vllm_model import VllmModel, reload, start_engine

if TYPE_CHECKING:
    from vllm import LLM

UNKNOWN_ITEMS = 1000
"""Of a benchmark whose config doesn't say how many."""


@ray.remote
class Engine:
    """One vLLM engine; its methods can be repeated.

    Args:
        config: of any of the runs that share it; it says how large the engine is.
    """

    def __init__(self, config: Config, gpus: int) -> None:
        self.config, self.gpus = config, gpus
        self.llm: LLM | None = None

    def node(self) -> str:
        """The address of the node it lives on."""
        return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    def score(self, model: Path, benchmarks: list[BenchmarkConfig], seed: int, progress: Reporter) -> dict[str, Any]:
        """Scores of the checkpoint by benchmark: metric, value, stderr, items."""
        if self.llm is None:
            progress("starting vLLM", 0, 1)
            self.llm = start_engine(
                model,
                max_tokens=self.config.model.max_tokens,
                memory=self.config.resources.vllm_memory,
                gpus=self.gpus,
                precision=self.config.sft.precision,
            )
        else:
            reload(self.llm, model)
        scores = evaluate(
            VllmModel(self.llm, seed, adapter=model if is_adapter(model) else None),
            benchmarks,
            allow_code_execution=self.config.allow_code_execution,
            progress=progress,
        )
        return {name: asdict(score) for name, score in scores.items()}


def dealt(benchmarks: Sequence[BenchmarkConfig], engines: int) -> list[list[BenchmarkConfig]]:
    """Benchmarks for each engine, as even as their known numbers of items make them; no engine is without."""
    parts: list[list[BenchmarkConfig]] = [[] for _ in range(min(engines, len(benchmarks)))]
    loads = [0] * len(parts)
    for benchmark in sorted(benchmarks, key=_items, reverse=True):
        lightest = loads.index(min(loads))
        parts[lightest].append(benchmark)
        loads[lightest] += _items(benchmark)
    return parts


def _items(benchmark: BenchmarkConfig) -> int:
    return benchmark.limit or benchmark.size or UNKNOWN_ITEMS


def engines(config: Config, cluster: Cluster) -> list[Any]:
    """Actors for a config's benchmarks; each starts its engine when it is first asked for scores."""
    gpus = cluster.tensor_parallel if cluster.gpus else 0
    make = Engine.options(  # type: ignore[attr-defined]
        num_cpus=0,
        num_gpus=gpus,
        max_restarts=2,
        max_task_retries=-1,  # a lost node costs several at once; `max_restarts` is the limit
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(cluster.benchmark_cpus), "TQDM_DISABLE": "1"}},
    )
    return [make.remote(config, gpus) for _ in dealt(config.benchmarks, cluster.benchmark_workers)]


def fits_all(configs: Sequence[Config]) -> bool:
    """Whether one engine can serve all these runs."""

    def needs(c: Config) -> tuple[Any, ...]:
        return c.model, c.benchmarks, c.resources, c.sft.precision, c.sft.lora, c.allow_code_execution

    return all(needs(config) == needs(configs[0]) for config in configs)


class Benchmarks:
    """The engines, started when they are first needed.

    Args:
        shared: those of a sweep, which outlive this run.
    """

    def __init__(self, config: Config, cluster: Cluster, shared: Sequence[Any] = ()) -> None:
        self.config, self.cluster = config, cluster
        self.parts = dealt(config.benchmarks, cluster.benchmark_workers)
        self.shared = shared
        self._engines: list[Any] = []

    def score(self, folder: Path, *, checkpoint: Path, progress: Reporter) -> dict[str, Any]:
        """Score the checkpoint of an SFT's stage folder.

        Raises:
            BadInput: no resources in time, or a benchmark that can't be run.
        """
        threads = self.cluster.benchmark_cpus
        self._engines = self._engines or list(self.shared) or engines(self.config, self.cluster)
        nodes = ray.get([engine.node.remote() for engine in self._engines])
        work = [{"CPU": threads, f"node:{node}": 0.001} for node in nodes]  # Ray's own resource of that one node
        try:
            with Reservation(work, self.config.resources.wait_seconds, "benchmarks"):
                found = ray.get(
                    [
                        engine.score.remote(checkpoint / MODEL, part, self.config.seed, progress)
                        for engine, part in zip(self._engines, self.parts, strict=True)
                    ]
                )
        except Exception:
            self.release()
            self.shared = ()  # they may be gone for good; another try has engines of its own
            raise
        if not self.cluster.keep_engine:
            self.release()
        scores = {name: score for part in found for name, score in part.items()}
        return {benchmark.name: scores[benchmark.name] for benchmark in self.config.benchmarks}

    def release(self) -> None:
        """Stop the engines and give their memory back; shared ones stay."""
        for engine in [] if self.shared else self._engines:
            ray.kill(engine)
        self._engines = []
