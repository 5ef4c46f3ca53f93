"""Mixtures that are trained, and what each gave: what every way to choose one is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ideal.config import Config
from ideal.config_inputs import BenchmarkConfig
from ideal.equilibrium import Update
from ideal.errors import BadInput
from ideal.influence import InfluenceTable
from service import data, items
from service.benchmark import Benchmarks, engines_needed, longest_first
from service.cluster import Cluster
from service.files import MODEL
from service.progress import Display, Reporter
from service.stages import Record, Stage, Store, Unfinished
from service.study import Study


@dataclass
class Iteration:
    """A mixture, what it gave, and what follows from it.

    Attributes:
        number: t of D_t.
        m: of the step that led to it; None for D0.
        accepted: whether its reference loss is no more than ``max_rise`` above the lowest of those before it.
        benchmark: all its scores; their stages are in ``scored``, by benchmark.
        table, update: None where no update follows.
        method: what chose it, if it wasn't an update.
    """

    number: int
    volumes: dict[str, int]
    m: float | None
    sft: Record
    reference: Record
    loss: float
    accepted: bool = True
    benchmark: Record | None = None
    scored: dict[str, Record] = field(default_factory=dict)
    influence: Record | None = None
    table: InfluenceTable | None = None
    update: Update | None = None
    method: str = ""

    @property
    def name(self) -> str:
        """D1, or the method's."""
        return self.method or f"D{self.number}"


@dataclass
class Outcome:
    """A whole optimisation, in the order it happened.

    Attributes:
        read: what the data was read as, before what is held out was removed.
        stopped: why it ended.
        tried: stages that a method went through to choose its mixture, besides ``iterations``.
    """

    data: Record
    iterations: list[Iteration] = field(default_factory=list)
    stopped: str = ""
    tried: list[Record] = field(default_factory=list)
    read: Record | None = None

    @property
    def accepted(self) -> list[Iteration]:
        return [iteration for iteration in self.iterations if iteration.accepted]

    @property
    def equilibrium(self) -> Iteration:
        """The accepted mixture of the lowest reference loss, the first of equal ones.

        Raises:
            BadInput: none is trained yet.
        """
        if not self.accepted:
            raise BadInput("mixture", "none is trained yet", "run it first; the same command goes on where it was")
        return min(self.accepted, key=lambda iteration: iteration.loss)

    @property
    def records(self) -> list[Record]:
        parts = [(i.sft, i.reference, i.influence, *(i.scored.values() or [i.benchmark])) for i in self.iterations]
        read = [self.read, self.data] if self.read else [self.data]
        return [*read, *self.tried, *(record for part in parts for record in part if record)]

    @property
    def search(self) -> list[Record]:
        """What choosing the mixture took: all but its own SFT, scores, and a reference loss that decides nothing."""
        last = self.equilibrium
        alone = len(self.iterations) == 1
        parts = [(None if i is last and alone else i.reference, i.sft, i.influence) for i in self.iterations]
        found = [*self.tried, *(record for part in parts for record in part if record)]
        return [record for record in found if record.fingerprint != last.sft.fingerprint]


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

        def work(folder: Path, progress: Reporter) -> dict[str, Any]:
            from service.plan import shards_training
            from service.sft import sft

            return sft(
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
            )

        return self.stage(stage, f"{name} SFT", work)

    def train(self, number: int, volumes: dict[str, int], m: float | None, method: str = "") -> Iteration:
        """SFT on a mixture, and its reference loss: the next iteration."""
        return self.evaluate(self.sft(volumes, method or f"D{number}"), number, volumes, m, method)

    def evaluate(
        self, model: Record, number: int, volumes: dict[str, int], m: float | None, method: str = ""
    ) -> Iteration:
        """A model's reference loss: the next iteration."""
        losses = self.reference(model, method or f"D{number}")
        iteration = Iteration(number, volumes, m, model, losses, self._objective(losses), method=method)
        self.outcome.iterations.append(iteration)
        self.happened(self.outcome)
        return iteration

    def reference(self, trained: Record, name: str) -> Record:
        """The losses on every reference set at an SFT's model, or at the base model."""
        config = self.config
        stage = Stage(
            "reference",
            {"precision": config.influence.precision},
            {"sft": trained.fingerprint, "data": self.data.fingerprint},
        )

        def work(folder: Path, progress: Reporter) -> dict[str, Any]:
            from service.reference import reference_losses

            return reference_losses(
                folder,
                checkpoint=trained.folder,
                data=self.data.folder,
                domains=[domain.name for domain in config.domains],
                config=config,
                cluster=self.cluster,
                progress=progress,
            )

        return self.stage(stage, f"{name} reference", work)

    def _objective(self, losses: Record) -> float:
        rows = list(losses.result.values())
        weights = [row["tokens"] if self.config.equilibrium.objective == "micro" else 1 for row in rows]
        return float(sum(row["loss"] * w for row, w in zip(rows, weights, strict=True)) / sum(weights))

    def benchmark(self, current: Iteration) -> None:
        """Scores at an iteration's checkpoint, each a stage, by as many engines at a time as there are."""
        order = longest_first(self.config.benchmarks)
        engines = engines_needed(self.config, self.cluster)
        try:
            if engines == 1:
                records = [self._looked_up(current, each) for each in order]
            else:
                with ThreadPoolExecutor(engines) as pool:
                    records = list(pool.map(lambda each: self._looked_up(current, each), order))
        finally:
            self.benchmarks.scored()
        found = {b.name: record for b, record in zip(order, records, strict=True) if isinstance(record, Record)}
        current.scored = {b.name: found[b.name] for b in self.config.benchmarks if b.name in found}
        for record in records:
            if isinstance(record, Unfinished):
                raise record
        current.benchmark = as_one(current.scored)
        self.happened(self.outcome)

    def _looked_up(self, current: Iteration, benchmark: BenchmarkConfig) -> Record | Unfinished:
        """A benchmark's record; where nothing runs and it has none, the others' are looked up all the same."""
        try:
            return self._scored(current, benchmark)
        except Unfinished as error:
            return error

    def _scored(self, current: Iteration, benchmark: BenchmarkConfig) -> Record:
        config, checkpoint = self.config, current.sft
        settings = data.benchmark_settings(benchmark, self.store.digests.of)
        return self.stage(
            Stage(
                "benchmark",
                {"benchmark": settings, "max_tokens": config.model.max_tokens},
                {"sft": checkpoint.fingerprint},
            ),
            f"{current.name} benchmark {benchmark.name}",
            lambda folder, progress: items.keep(
                folder, self.benchmarks.score(benchmark, checkpoint=checkpoint.folder, progress=progress)
            ),
        )


def as_one(scored: dict[str, Record]) -> Record:
    """All scores of a checkpoint as one record: by benchmark; the seconds are those of all."""
    records = list(scored.values())
    names = " ".join(record.fingerprint for record in records)
    return Record(
        "benchmark",
        hashlib.sha256(names.encode()).hexdigest()[:20],
        records[0].folder,
        {name: record.result for name, record in scored.items()},
        sum(record.seconds for record in records),
        any(record.fresh for record in records),
    )
