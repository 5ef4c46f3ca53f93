"""The optimisation: D0 → D1 → D2, one stage after another.

    D0 ─▶ SFT ─▶ θ0 ─┬─▶ reference loss
                     ├─▶ influence ─▶ update ─▶ D1 ─▶ SFT ─▶ θ1 ─▶ …
                     └─▶ benchmarks

The result is the mixture of the lowest reference loss. One whose loss lies above the lowest so far by more than
``max_rise`` is rejected: the lowest one is updated again with m/2. Small rises can't add up, since each is held against
the lowest. Every stage is recorded, so a run that was killed goes on where it was, and one that is done does no work.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ideal.domains import starting_volumes
from ideal.equilibrium import Update, update
from ideal.influence import InfluenceTable
from service.files import MODEL, TABLE
from service.mixtures import Iteration, Mixtures, Outcome
from service.progress import Reporter
from service.stages import Stage


class Optimisation(Mixtures):
    """One run of the method.

    Attributes:
        reason: why no further mixture is sought; the run is at its end only when the last one is scored.
    """

    reason = ""

    def run(self) -> Outcome:
        """Optimise the mixture.

        Raises:
            BadInput: something in the config or the data doesn't hold.
        """
        config = self.config.equilibrium
        self.base = self.base_model()
        self.data = self.example_sets()
        self.outcome = Outcome(self.data, read=self.read)
        try:
            current = self.train(0, starting_volumes(self.config, self.data.result), None)
            m = config.m
            for number in range(1, config.iterations + 1):
                self._influence_and_benchmark(current)
                following, m = self._improve(current, number, m)
                if following is None:
                    break
                current = following
            else:
                self.reason = f"all {config.iterations} iterations done"
            self.benchmark(current)
        finally:
            self.benchmarks.release()
        self.outcome.stopped = self.reason
        self.happened(self.outcome)
        return self.outcome

    def _improve(self, current: Iteration, number: int, m: float) -> tuple[Iteration | None, float]:
        """The next accepted mixture and the m that led to it; None if the run is at its end."""
        config = self.config.equilibrium
        for _ in range(config.retries + 1):
            best = self.outcome.equilibrium
            step = self._update(current, m)
            current.update = current.update or step
            if not step.told(config.sure):
                self.reason = "no domain's influence is told from 0: larger sets would be needed"
                return None, m
            if step.change(list(current.volumes.values())) < config.tolerance:
                self.reason = f"no volume would change by {config.tolerance:.1%}"
                return None, m
            following = self.train(number, dict(zip(current.volumes, step.volumes, strict=True)), m)
            if following.loss <= best.loss * (1 + config.max_rise):
                current.update = step
                return following, m
            following.accepted = False
            self.benchmark(following)
            current, m = best, m / 2
        self.reason = f"the reference loss rose, down to m = {m * 2:g}: D{current.number} is kept"
        return None, m

    def _update(self, current: Iteration, m: float) -> Update:
        config, table = self.config, current.table
        assert table is not None
        kind = config.equilibrium.objective
        found = [self.data.result[domain] for domain in current.volumes]
        cloud = table.resampled(config.influence.resamples, config.seed, config.influence.widening)
        return update(
            table.objective(table.matrix(), kind),
            table.objective(cloud, kind),
            table.objective(table.crowding, kind),
            list(current.volumes.values()),
            [each["pool"] for each in found],
            [each["tokens_per_example"] for each in found],
            config.equilibrium,
            m,
            config.influence.confidence,
        )

    def _influence_and_benchmark(self, current: Iteration) -> None:
        """Both read the same checkpoint: at the same time where the cluster has room."""
        steps = [self._influence, self.benchmark]
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

        def work(folder: Path, progress: Reporter) -> dict[str, Any]:
            from service.influence import influence
            from service.plan import layer_blocks
            from service.sample import Sample

            return influence(
                folder,
                checkpoint=current.sft.folder,
                sample=Sample(self.data.folder, current.volumes, config.influence, config.seed),
                config=config,
                cluster=self.cluster,
                layer_blocks=layer_blocks(config, current.sft.folder / MODEL, self.cluster),
                progress=progress,
            )

        current.influence = self.stage(stage, f"{current.name} influence", work)
        current.table = InfluenceTable.load(current.influence.folder / TABLE)
