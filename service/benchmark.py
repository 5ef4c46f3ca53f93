"""Benchmarks by an actor that keeps one vLLM engine warm and reloads weights for each checkpoint.

On CPU the engine holds no CPU of Ray's while it is idle, or SFT could never have all of them; they are reserved for as
long as it works. On GPU the engine holds its GPU, and is given back before SFT where SFT needs that GPU too.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from ideal.benchmarks.evaluation import evaluate
from ideal.config import Config
from service.cluster import Cluster, Reservation
from service.data import MODEL
from service.progress import Reporter
from service.vllm_model import VllmModel, reload, start_engine

if TYPE_CHECKING:
    from vllm import LLM


@ray.remote
class Engine:
    """One vLLM engine; its methods can be repeated."""

    def __init__(self, config: Config, gpu: bool) -> None:
        self.config, self.gpu = config, gpu
        self.llm: LLM | None = None

    def node(self) -> str:
        """The address of the node it lives on."""
        return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    def score(self, model: Path, progress: Reporter) -> dict[str, Any]:
        """Scores of the checkpoint by benchmark: metric, value, stderr, items."""
        if self.llm is None:
            progress("starting vLLM", 0, 1)
            self.llm = start_engine(
                model,
                max_tokens=self.config.model.max_tokens,
                memory=self.config.resources.vllm_memory,
                seed=self.config.seed,
                gpu=self.gpu,
                precision=self.config.sft.precision,
            )
        else:
            reload(self.llm, model)
        scores = evaluate(
            VllmModel(self.llm),
            self.config.benchmarks,
            allow_code_execution=self.config.allow_code_execution,
            progress=progress,
        )
        return {name: asdict(score) for name, score in scores.items()}


class Benchmarks:
    """The engine, started when it is first needed."""

    def __init__(self, config: Config, cluster: Cluster) -> None:
        self.config, self.cluster = config, cluster
        self._engine: Any = None

    def score(self, folder: Path, *, checkpoint: Path, progress: Reporter) -> dict[str, Any]:
        """Score the checkpoint of an SFT's stage folder.

        Raises:
            BadInput: no resources in time, or a benchmark that can't be run.
        """
        threads = self.cluster.sft_cpus
        if self._engine is None:
            self._engine = Engine.options(  # type: ignore[attr-defined]
                num_cpus=0,
                num_gpus=self.cluster.benchmark_gpus,
                max_restarts=2,
                max_task_retries=2,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}},
            ).remote(self.config, bool(self.cluster.gpus))
        node = ray.get(self._engine.node.remote())
        work = {"CPU": threads, f"node:{node}": 0.001}  # Ray's own resource of that one node
        try:
            with Reservation([work], self.config.resources.wait_seconds, "benchmarks"):
                scores: dict[str, Any] = ray.get(self._engine.score.remote(checkpoint / MODEL, progress))
        except Exception:
            self.release()
            raise
        if not self.cluster.keep_engine:
            self.release()
        return scores

    def release(self) -> None:
        """Stop the engine and give its memory back."""
        if self._engine is not None:
            ray.kill(self._engine)
            self._engine = None
