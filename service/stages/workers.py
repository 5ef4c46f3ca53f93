"""What a stage runs on: nothing in it changes a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ideal.config.config import Config, ResourcesConfig
from service.cluster.cluster import Cluster, on_one_worker
from service.cluster.engines import Benchmarks
from service.cluster.progress import Reporter

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """A cluster's workers for one stage of a config.

    Attributes:
        progress: where the stage says how far it is.
        engines: that score checkpoints.
    """

    config: Config
    cluster: Cluster
    progress: Reporter
    engines: Benchmarks

    @property
    def resources(self) -> ResourcesConfig:
        """Sizes of batches, and how long to wait."""
        return self.config.resources

    @property
    def allow_code_execution(self) -> bool:
        """Whether benchmarks may bring code of their own."""
        return self.config.allow_code_execution

    def one(self, work: Callable[..., T], *arguments: Any, what: str, cpus: int | None = None, retries: int = 3) -> T:
        """What ``work(*arguments)`` returns on one worker.

        Args:
            what: the stage, for errors.
            cpus: of the worker; all that SFT's worker has, if not given.
            retries: where its process dies.

        Raises:
            BadInput: its resources weren't free in time.
        """
        seconds = self.resources.wait_seconds
        return on_one_worker(
            work, *arguments, cluster=self.cluster, seconds=seconds, what=what, cpus=cpus, retries=retries
        )

    def sharded(self, model: Path) -> bool:
        """Whether SFT of a model folder is divided among its workers."""
        from service.planning.plan import shards_training

        return shards_training(self.config, model, self.cluster)

    def layer_blocks(self, model: Path) -> int:
        """Parts that the tracked layers of a model folder are cut in, so that their influence fits."""
        from service.planning.plan import layer_blocks

        return layer_blocks(self.config, model, self.cluster)
