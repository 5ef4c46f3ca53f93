"""What every kind of run begins with: the base model, the examples, and stages that are shown and explained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ideal.config import Config
from ideal.domains import check_rejected
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
        base, data: the base model's and the examples' records, once they are asked for.
        read: of the examples before what is held out was removed.

    Raises:
        ValueError: a precision is still `auto`, which no fingerprint may hold.
    """

    base: Record
    data: Record
    read: Record | None = None

    def __init__(self, config: Config, cluster: Cluster, store: Store, display: Display) -> None:
        if config.undecided:
            raise ValueError("a precision is still `auto`: service.precision.decide must come first")
        self.config, self.cluster, self.store, self.display = config, cluster, store, display

    def base_model(self) -> Record:
        stage = Stage("model", data.model_settings(self.config.model, self.store.digests.of), {})
        cpus, steps = self.cluster.sft_cpus, self.config.resources.checkpoint_steps
        return self.stage(
            stage,
            "base model",
            lambda folder, progress: data.base_model(folder, self.config.model, cpus, steps, progress),
        )

    def example_sets(self) -> Record:
        """The examples, without those that are held out.

        The record's fingerprint is their content, so that what changes none of them changes no stage that follows.

        Raises:
            BadInput: a source has too many unusable rows, or nothing that isn't held out.
        """
        config, base, checksum = self.config, self.base, self.store.digests.of
        read = self.read = self.stage(
            Stage("examples", data.example_settings(config, checksum), {"model": base.fingerprint}),
            "examples",
            lambda folder, progress: data.examples(folder, model=base.folder, config=config, progress=progress),
        )
        check_rejected(read.result, config.max_rejected)
        cleaned = self.stage(
            Stage("data", {"questions": data.question_settings(config, checksum)}, {"examples": read.fingerprint}),
            "data",
            lambda folder, progress: data.data(
                folder, examples=read.folder, found=read.result, config=config, progress=progress
            ),
        )
        return replace(cleaned, fingerprint=data.content(cleaned.result))

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
