"""What every kind of run begins with: the base model, the examples, and stages that are shown and explained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ideal.config import Config
from service import data
from service.cluster import Cluster
from service.failures import explain, lost, root_cause
from service.progress import Display
from service.stages import Record, Stage, Store, Unfinished

ATTEMPTS = 3
"""At a stage whose node, actors or objects are lost."""


class Study:
    """A config on a cluster with a stage store.

    Attributes:
        base, data: the first two stages' records, once they are asked for.
    """

    base: Record
    data: Record

    def __init__(self, config: Config, cluster: Cluster, store: Store, display: Display) -> None:
        self.config, self.cluster, self.store, self.display = config, cluster, store, display

    def base_model(self) -> Record:
        stage = Stage("model", data.model_settings(self.config.model), {})
        cpus = self.cluster.sft_cpus
        return self.stage(
            stage,
            "base model",
            lambda folder, progress: data.base_model(folder, self.config.model, cpus, progress),
        )

    def example_sets(self) -> Record:
        stage = Stage("data", data.data_settings(self.config), {"model": self.base.fingerprint})
        return self.stage(
            stage,
            "data",
            lambda folder, progress: data.data(folder, model=self.base.folder, config=self.config, progress=progress),
        )

    def stage(
        self, stage: Stage, name: str, work: Callable[[Path, Any], dict[str, Any]], attempts: int = ATTEMPTS
    ) -> Record:
        """The stage's record, with a progress line while it runs.

        Raises:
            BadInput: as it came from a worker, or StageFailed around any other error.
        """

        def shown(folder: Path) -> dict[str, Any]:
            with self.display.stage(name) as progress:
                return work(folder, progress)

        try:
            return self.store.run(stage, shown)
        except Unfinished:
            raise
        except Exception as error:
            if attempts == 1 or not lost(error):
                raise explain(error, stage, name) from error
            self.store.notice(f"{name} lost what it ran on ({type(root_cause(error)).__name__}); it runs again")
        return self.stage(stage, name, work, attempts - 1)
