"""The optimisation: D0 → D1 → D2, one stage after another.

    D0 ─▶ SFT ─▶ θ0 ─┬─▶ reference loss
                     ├─▶ influence ─▶ update ─▶ D1 ─▶ SFT ─▶ θ1 ─▶ …
                     └─▶ benchmarks

A mixture that raises the reference loss by more than ``max_rise`` is rejected: the last accepted one is updated again
with m/2. Every stage is recorded, so a run that was killed goes on where it was, and one that is done does no work.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ideal.config import Config
from ideal.domains import starting_volumes
from ideal.equilibrium import Update, update
from ideal.influence import InfluenceTable
from service import data
from service.benchmark import Benchmarks
from service.cluster import Cluster
from service.influence import TABLE, influence
from service.plan import layer_blocks, shards_training
from service.progress import Display
from service.reference import reference_losses
from service.sample import Sample
from service.sft import sft
from service.stages import Record, Stage, Store
from service.study import Study


@dataclass
class Iteration:
    """A mixture, what it gave, and what follows from it.

    Attributes:
        number: t of D_t.
        m: largest relative change that led to it; None for D0.
        accepted: whether it didn't raise the reference loss (by more than ``max_rise``).
        table, update: None where no update follows.
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


@dataclass
class Outcome:
    """A whole optimisation, in the order it happened.

    Attributes:
        stopped: why it ended.
    """

    data: Record
    iterations: list[Iteration] = field(default_factory=list)
    stopped: str = ""

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
        return [self.data, *(record for part in parts for record in part if record)]


class Optimisation(Study):
    """One run of the method.

    Args:
        happened: called with the outcome so far after every change of it.
    """

    def __init__(
        self,
        config: Config,
        cluster: Cluster,
        store: Store,
        display: Display,
        happened: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        super().__init__(config, cluster, store, display)
        self.happened = happened
        self.benchmarks = Benchmarks(config, cluster)

    def run(self) -> Outcome:
        """Optimise the mixture.

        Raises:
            BadInput: something in the config or the data doesn't hold.
        """
        config = self.config.equilibrium
        self.base = self.base_model()
        self.data = self.example_sets()
        self.outcome = Outcome(self.data)
        try:
            current = self._train(0, starting_volumes(self.config, self.data.result), None)
            m = config.m
            for number in range(1, config.iterations + 1):
                self._influence_and_benchmark(current)
                following, m = self._improve(current, number, m)
                if following is None:
                    break
                current = following
            else:
                self.outcome.stopped = f"all {config.iterations} iterations done"
            self._benchmark(current)
        finally:
            self.benchmarks.release()
        self.happened(self.outcome)
        return self.outcome

    def _improve(self, current: Iteration, number: int, m: float) -> tuple[Iteration | None, float]:
        """The next accepted mixture and the m that led to it; None if the run is at its end."""
        config = self.config.equilibrium
        for _ in range(config.retries + 1):
            step = self._update(current, m)
            current.update = current.update or step
            if not any(step.decided):
                self.outcome.stopped = "no domain's influence is told from 0: larger sets would be needed"
                return None, m
            if step.change(list(current.volumes.values())) < config.tolerance:
                self.outcome.stopped = f"no volume would change by {config.tolerance:.1%}"
                return None, m
            following = self._train(number, dict(zip(current.volumes, step.volumes, strict=True)), m)
            if following.loss <= current.loss * (1 + config.max_rise):
                current.update = step
                return following, m
            following.accepted = False
            self._benchmark(following)
            m /= 2
        self.outcome.stopped = f"the reference loss rose, down to m = {m * 2:g}: D{current.number} is kept"
        return None, m

    def _update(self, current: Iteration, m: float) -> Update:
        config, table = self.config, current.table
        assert table is not None
        kind = config.equilibrium.objective
        found = [self.data.result[domain] for domain in current.volumes]
        return update(
            table.objective(table.matrix(), kind),
            table.objective(table.resampled(config.influence.resamples, config.seed, config.influence.widening), kind),
            list(current.volumes.values()),
            [each["pool"] for each in found],
            [each["tokens_per_example"] for each in found],
            config.equilibrium,
            m,
            config.influence.confidence,
        )

    def _train(self, number: int, volumes: dict[str, int], m: float | None) -> Iteration:
        """SFT on a mixture, and its reference loss."""
        config = self.config
        stage = Stage(
            "sft",
            {
                "sft": config.sft.model_dump(mode="json"),
                "averaged": config.influence.averaged,
                "seed": config.seed,
                "volumes": volumes,
            },
            {"model": self.base.fingerprint, "data": self.data.fingerprint},
        )
        trained = self.stage(
            stage,
            f"D{number} SFT",
            lambda folder, progress: sft(
                folder,
                base=self.base.folder,
                data=self.data.folder,
                volumes=volumes,
                config=config.sft,
                averaged=config.influence.averaged,
                seed=config.seed,
                resources=config.resources,
                cluster=self.cluster,
                sharded=shards_training(config, self.base.folder / data.MODEL, self.cluster),
                progress=progress,
            ),
        )
        stage = Stage(
            "reference",
            {"precision": config.influence.precision},
            {"sft": trained.fingerprint, "data": self.data.fingerprint},
        )
        losses = self.stage(
            stage,
            f"D{number} reference",
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
        iteration = Iteration(number, volumes, m, trained, losses, self._objective(losses))
        self.outcome.iterations.append(iteration)
        self.happened(self.outcome)
        return iteration

    def _objective(self, losses: Record) -> float:
        rows = list(losses.result.values())
        weights = [row["tokens"] if self.config.equilibrium.objective == "micro" else 1 for row in rows]
        return float(sum(row["loss"] * w for row, w in zip(rows, weights, strict=True)) / sum(weights))

    def _influence_and_benchmark(self, current: Iteration) -> None:
        """Both read the same checkpoint: at the same time where the cluster has room."""
        steps = [self._influence, self._benchmark]
        if not self.cluster.together:
            for step in steps:
                step(current)
            return
        with ThreadPoolExecutor(len(steps)) as pool:
            for future in [pool.submit(step, current) for step in steps]:
                future.result()

    def _influence(self, current: Iteration) -> None:
        config = self.config
        settings = config.influence.of_the_table()
        stage = Stage(
            "influence",
            {"influence": settings, "seed": config.seed, "volumes": current.volumes},
            {"sft": current.sft.fingerprint, "data": self.data.fingerprint},
        )
        sample = Sample(self.data.folder, current.volumes, config.influence, config.seed)
        current.influence = self.stage(
            stage,
            f"D{current.number} influence",
            lambda folder, progress: influence(
                folder,
                checkpoint=current.sft.folder,
                sample=sample,
                config=config,
                cluster=self.cluster,
                layer_blocks=layer_blocks(config, current.sft.folder / data.MODEL, self.cluster),
                progress=progress,
            ),
        )
        current.table = InfluenceTable.load(current.influence.folder / TABLE)

    def _benchmark(self, current: Iteration) -> None:
        config = self.config
        stage = Stage(
            "benchmark",
            {"benchmarks": data.benchmark_settings(config), "max_tokens": config.model.max_tokens},
            {"sft": current.sft.fingerprint},
        )
        current.benchmark = self.stage(
            stage,
            f"D{current.number} benchmarks",
            lambda folder, progress: self.benchmarks.score(folder, checkpoint=current.sft.folder, progress=progress),
        )
        self.happened(self.outcome)
