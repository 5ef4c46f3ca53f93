"""Mixtures that are trained, and what each gave: what every way to choose one is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ideal.config import Config
from ideal.equilibrium import Update
from ideal.influence import InfluenceTable
from ideal.mixture import reduced
from service import data
from service.benchmark import Benchmarks
from service.cluster import Cluster
from service.files import MODEL
from service.plan import shards_training
from service.progress import Display
from service.reference import reference_losses
from service.sft import sft as train_mixture
from service.stages import Record, Stage, Store
from service.study import Study


@dataclass
class Iteration:
    """A mixture, what it gave, and what follows from it.

    Attributes:
        number: t of D_t.
        m: of the step that led to it; None for D0.
        accepted: whether it didn't raise the reference loss (by more than ``max_rise``).
        table, update: None where no update follows.
        method: what chose it, if it wasn't an update.
        share: of its examples that it was trained on.
    """

    number: int
    volumes: dict[str, int]
    m: float | None
    sft: Record
    reference: Record
    loss: float
    accepted: bool = True
    benchmark: Record | None = None
    influence: Record | None = None
    table: InfluenceTable | None = None
    update: Update | None = None
    method: str = ""
    share: float = 1.0

    @property
    def name(self) -> str:
        """D1, D1 ×0.25 if it was trained on a quarter of itself, or the method's."""
        return self.method or named(self.number, self.share)


@dataclass
class Outcome:
    """A whole optimisation, in the order it happened.

    Attributes:
        stopped: why it ended.
        tried: stages that a method went through to choose its mixture, besides ``iterations``.
    """

    data: Record
    iterations: list[Iteration] = field(default_factory=list)
    stopped: str = ""
    tried: list[Record] = field(default_factory=list)

    @property
    def accepted(self) -> list[Iteration]:
        return [iteration for iteration in self.iterations if iteration.accepted]

    @property
    def equilibrium(self) -> Iteration:
        """The last accepted mixture."""
        return self.accepted[-1]

    @property
    def records(self) -> list[Record]:
        parts = [(i.sft, i.reference, i.influence, i.benchmark) for i in self.iterations]
        return [self.data, *self.tried, *(record for part in parts for record in part if record)]

    @property
    def search(self) -> list[Record]:
        """What choosing the mixture took: all but its own SFT and evaluation, and the others' benchmarks."""
        last = self.equilibrium
        parts = [(i.influence,) if i is last else (i.sft, i.reference, i.influence) for i in self.iterations]
        return [*self.tried, *(record for part in parts for record in part if record)]


def named(number: int, share: float) -> str:
    """An iteration's name, unless a method gives it one."""
    return f"D{number}" + (f" ×{share:g}" if share < 1 else "")


class Mixtures(Study):
    """A study that trains mixtures and scores them.

    Args:
        happened: called with the outcome so far after every change of it.
        engines: that score for other runs, too. Default: engines of its own.
    """

    outcome: Outcome

    def __init__(
        self,
        config: Config,
        cluster: Cluster,
        store: Store,
        display: Display,
        happened: Callable[[Outcome], None] = lambda outcome: None,
        engines: Sequence[Any] = (),
    ) -> None:
        super().__init__(config, cluster, store, display)
        self.happened = happened
        self.benchmarks = Benchmarks(config, cluster, engines)

    def sft(self, volumes: dict[str, int], name: str) -> Record:
        """SFT of θ₀ on a mixture."""
        config = self.config
        stage = Stage(
            "sft",
            {
                "sft": config.sft.of_the_weights(),
                "averaged": config.influence.averaged,
                "seed": config.seed,
                "volumes": volumes,
            },
            {"model": self.base.fingerprint, "data": self.data.fingerprint},
        )
        return self.stage(
            stage,
            f"{name} SFT",
            lambda folder, progress: train_mixture(
                folder,
                base=self.base.folder,
                data=self.data.folder,
                volumes=volumes,
                config=config.sft,
                averaged=config.influence.averaged,
                seed=config.seed,
                resources=config.resources,
                cluster=self.cluster,
                sharded=shards_training(config, self.base.folder / MODEL, self.cluster),
                progress=progress,
            ),
        )

    def train(
        self, number: int, volumes: dict[str, int], m: float | None, method: str = "", share: float = 1.0
    ) -> Iteration:
        """SFT on a mixture, or a share of it, and its reference loss: the next iteration."""
        name = method or named(number, share)
        config, trained = self.config, self.sft(reduced(volumes, share), name)
        stage = Stage(
            "reference",
            {"precision": config.influence.precision},
            {"sft": trained.fingerprint, "data": self.data.fingerprint},
        )
        losses = self.stage(
            stage,
            f"{name} reference",
            lambda folder, progress: reference_losses(
                folder,
                checkpoint=trained.folder,
                data=self.data.folder,
                domains=list(volumes),
                config=config,
                cluster=self.cluster,
                progress=progress,
            ),
        )
        iteration = Iteration(number, volumes, m, trained, losses, self._objective(losses), method=method, share=share)
        self.outcome.iterations.append(iteration)
        self.happened(self.outcome)
        return iteration

    def _objective(self, losses: Record) -> float:
        rows = list(losses.result.values())
        weights = [row["tokens"] if self.config.equilibrium.objective == "micro" else 1 for row in rows]
        return float(sum(row["loss"] * w for row, w in zip(rows, weights, strict=True)) / sum(weights))

    def benchmark(self, current: Iteration) -> None:
        """Scores at an iteration's checkpoint."""
        config = self.config
        stage = Stage(
            "benchmark",
            {"benchmarks": data.benchmark_settings(config), "max_tokens": config.model.max_tokens},
            {"sft": current.sft.fingerprint},
        )
        current.benchmark = self.stage(
            stage,
            f"{current.name} benchmarks",
            lambda folder, progress: self.benchmarks.score(folder, checkpoint=current.sft.folder, progress=progress),
        )
        self.happened(self.outcome)
