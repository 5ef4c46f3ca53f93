"""What runs stages: a runner is given to whatever decides which ones.

`OnWorkers` runs them on a cluster, each once. `Recorded` only looks at what is recorded, so that a run is replayed by
the very code that runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ideal.config.config import Config
from service.cluster.cluster import Cluster
from service.cluster.engines import Benchmarks, engines_needed
from service.cluster.failures import explain, lost, root_cause
from service.cluster.progress import Display
from service.stages.content import Checksum
from service.stages.workers import Workers
from service.store.stage import R_co, Record, Stage
from service.store.store import Records, Store, Unfinished

ATTEMPTS = 3
"""At a stage whose node, actors or objects are lost."""
T = TypeVar("T")


@dataclass(frozen=True)
class AtOnce:
    """How many stages of a kind run beside each other.

    Attributes:
        with_influence: whether benchmarks do beside an influence.
    """

    trainings: int = 1
    benchmarks: int = 1
    with_influence: bool = False


class Runner(Protocol):
    """Gives a stage's record."""

    @property
    def at_once(self) -> AtOnce: ...

    @property
    def checksum(self) -> Checksum: ...

    def __call__(self, stage: Stage[R_co], name: str) -> Record[R_co]:
        """The stage's record.

        Args:
            name: what users read of the stage, e.g. `D1 SFT`.
        """

    def scored(self) -> None:
        """A checkpoint has all its scores: what scored it may make room."""


def side_by_side(calls: Sequence[Callable[[], T]], at_once: int) -> list[T]:
    """What each call returns, in their order; one after another if no two may run at once."""
    if at_once == 1:
        return [call() for call in calls]
    with ThreadPoolExecutor(at_once) as pool:
        try:
            return [future.result() for future in [pool.submit(call) for call in calls]]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass
class Recorded:
    """Looks stages up, and runs none.

    Raises:
        Unfinished: a stage isn't recorded.
    """

    store: Records
    at_once: AtOnce = field(default=AtOnce(), init=False)

    @property
    def checksum(self) -> Checksum:
        return self.store.digests.of

    def __call__(self, stage: Stage[R_co], name: str) -> Record[R_co]:
        found = self.store.find(stage)
        if found is None:
            raise Unfinished(stage.kind)
        return found

    def scored(self) -> None:
        """Nothing scores."""


class OnWorkers:
    """Runs stages on a cluster, with a progress line for each; what is recorded isn't run. A context manager.

    Args:
        engines: that score for other runs, too. Default: engines of its own.

    Raises:
        BadInput: as a stage raises it; StageFailed around any other error.
    """

    def __init__(
        self, config: Config, cluster: Cluster, store: Store, display: Display, engines: Sequence[Any] = ()
    ) -> None:
        self.config, self.cluster, self.store, self.display = config, cluster, store, display
        self.engines = Benchmarks(config, cluster, engines)
        self.at_once = AtOnce(cluster.influence_workers, engines_needed(config, cluster), cluster.together)

    def __enter__(self) -> OnWorkers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.engines.release()

    @property
    def checksum(self) -> Checksum:
        return self.store.digests.of

    def __call__(self, stage: Stage[R_co], name: str) -> Record[R_co]:
        for left in reversed(range(ATTEMPTS)):
            try:
                return self.store.run(stage, lambda folder: self._work(stage, name, folder))
            except Exception as error:
                if not left or not lost(error):
                    raise explain(error, stage, name) from error
                self.store.notice(f"{name} lost what it ran on ({type(root_cause(error)).__name__}); it runs again")
        raise AssertionError("the last attempt returns or raises")

    def scored(self) -> None:
        self.engines.scored()

    def _work(self, stage: Stage[R_co], name: str, folder: Path) -> R_co:
        with self.display.stage(name) as progress:
            workers = Workers(config=self.config, cluster=self.cluster, progress=progress, engines=self.engines)
            return stage.run(folder, workers)
