"""Benchmarks by actors that each keep a vLLM engine warm and reload weights for each checkpoint.

Every benchmark is a stage of its own, so that one that is added or changed is all that runs; several engines take one
at a time. On CPU an engine holds no CPU of Ray's while it is idle, or SFT could never have all of them; they are
reserved for as long as it works. On GPU it holds its GPUs, and is given back before SFT where SFT needs them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from queue import LifoQueue
from typing import TYPE_CHECKING, Any

import ray

from ideal.config.config import Config
from ideal.config.inputs import BenchmarkConfig
from service.cluster.cluster import Cluster, Reservation
from service.cluster.progress import Reporter
from service.store.layout import MODEL

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
        self.loaded: Path | None = None

    def node(self) -> str:
        """The address of the node it lives on."""
        return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    def score(self, model: Path, benchmark: BenchmarkConfig, seed: int, progress: Reporter) -> dict[str, Any]:
        """A benchmark's score of a checkpoint: metric, value, stderr, items, by_item."""
        from ideal.benchmarks.evaluation import evaluate
        from ideal.model.files import is_adapter
        from service.cluster.vllm_model import VllmModel, reload, start_engine

        if self.llm is None:
            progress("starting vLLM", 0, 1)
            self.llm = start_engine(
                model,
                max_tokens=self.config.model.max_tokens,
                gpu_share=self.config.resources.vllm_gpu_share,
                cpu_cache=self.config.resources.vllm_cpu_cache,
                gpus=self.gpus,
                precision=self.config.sft.precision,
            )
        elif self.loaded != model:
            self.loaded = None
            reload(self.llm, model)
        self.loaded = model
        scores = evaluate(
            VllmModel(self.llm, seed, adapter=model if is_adapter(model) else None),
            [benchmark],
            allow_code_execution=self.config.allow_code_execution,
            progress=progress,
        )
        return asdict(scores[benchmark.name])


def longest_first(benchmarks: Sequence[BenchmarkConfig]) -> list[BenchmarkConfig]:
    """In the order in which engines that take one at a time end at nearly the same time, as far as items tell."""
    return sorted(benchmarks, key=lambda each: each.limit or each.size or UNKNOWN_ITEMS, reverse=True)


def engines_needed(config: Config, cluster: Cluster) -> int:
    """The cluster's, as far as there are benchmarks for them."""
    return min(cluster.benchmark_workers, len(config.benchmarks))


def engines(config: Config, cluster: Cluster, count: int = 0) -> list[Any]:
    """Actors for a config's benchmarks, so many or all; each starts its engine when it is first asked for a score."""
    gpus = cluster.tensor_parallel if cluster.gpus else 0
    make = Engine.options(  # type: ignore[attr-defined]
        num_cpus=0,
        num_gpus=gpus,
        max_restarts=2,
        max_task_retries=-1,  # a lost node costs several at once; `max_restarts` is the limit
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(cluster.benchmark_cpus), "TQDM_DISABLE": "1"}},
    )
    return [make.remote(config, gpus) for _ in range(count or engines_needed(config, cluster))]


def fits_all(configs: Sequence[Config]) -> bool:
    """Whether one engine can serve all these runs."""

    def needs(c: Config) -> tuple[Any, ...]:
        adapters = None if c.method == "base" else c.sft.lora
        return c.model, c.benchmarks, c.resources, c.sft.precision, adapters, c.allow_code_execution

    return all(needs(config) == needs(configs[0]) for config in configs)


class Benchmarks:
    """The engines, started when they are first needed; several threads may ask for scores.

    Args:
        shared: those of a sweep, which outlive this run.
    """

    def __init__(self, config: Config, cluster: Cluster, shared: Sequence[Any] = ()) -> None:
        self.config, self.cluster = config, cluster
        self._own: list[Any] = []
        self._idle: LifoQueue[Any] = LifoQueue()  # None: one that isn't started; those that are warm come first
        for engine in shared or [None] * engines_needed(config, cluster):
            self._idle.put(engine)

    def score(self, benchmark: BenchmarkConfig, *, checkpoint: Path, seed: int, progress: Reporter) -> dict[str, Any]:
        """A benchmark's score of the checkpoint of an SFT's stage folder, as soon as an engine is idle.

        Raises:
            BadInput: no resources in time, or a benchmark that can't be run.
        """
        engine = self._idle.get() or self._started()
        try:
            node = ray.get(engine.node.remote())
            work = {"CPU": self.cluster.benchmark_cpus, f"node:{node}": 0.001}  # Ray's own resource of that one node
            with Reservation([work], self.config.resources.wait_seconds, "benchmarks"):
                found: dict[str, Any] = ray.get(engine.score.remote(checkpoint / MODEL, benchmark, seed, progress))
        except Exception:
            self._end(engine)
            self._idle.put(None)  # it may be gone for good, a shared one, too: another try has its own
            raise
        self._idle.put(engine)
        return found

    def scored(self) -> None:
        """A checkpoint has all its scores: what others need is given back."""
        if not self.cluster.keep_engine:
            self.release()

    def release(self) -> None:
        """Stop the engines and give their memory back; shared ones stay."""
        for idle in [self._idle.get() for _ in range(self._idle.qsize())]:
            self._idle.put(None if idle in self._own else idle)
        for engine in list(self._own):
            self._end(engine)

    def _started(self) -> Any:
        (engine,) = engines(self.config, self.cluster, 1)
        self._own.append(engine)
        return engine

    def _end(self, engine: Any) -> None:
        if engine in self._own:
            self._own.remove(engine)
            ray.kill(engine)
