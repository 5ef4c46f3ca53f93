"""The other ways to choose a mixture (``ideal.methods``), on a cluster: what they ask for, as stages.

What a method trained to choose is what another may have trained before: Joint SFT is D0 and DoReMi's reference, and
the Specific SFT models are what `merge` averages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ideal.domains import starting_volumes
from ideal.methods import METHODS
from ideal.methods.problem import Problem
from service import proxies
from service.mixtures import Mixtures, Outcome
from service.progress import Reporter
from service.retraining import Piece, losses_after, retrainers, training, training_stage
from service.stages import Record, Stage


class Baseline(Mixtures):
    """One run of a method that isn't `equilibrium`: its mixture, trained and scored."""

    def run(self) -> Outcome:
        """Choose a mixture, train on it, score it.

        Raises:
            BadInput: something in the config or the data doesn't hold.
        """
        config = self.config
        self.base = self.base_model()
        self.data = self.example_sets()
        self.outcome = Outcome(self.data)
        found = self.data.result
        self.problem = Problem(
            config,
            starting_volumes(config, found),
            {domain: found[domain]["pool"] for domain in found},
            {domain: found[domain]["tokens_per_example"] for domain in found},
        )
        try:
            volumes = METHODS[config.method](self.problem, self)
            self.benchmark(self.train(0, volumes, None, config.method))
        finally:
            self.benchmarks.release()
        self.outcome.stopped = f"the mixture that `{config.method}` chose is trained"
        self.happened(self.outcome)
        return self.outcome

    def trained(self, volumes: Mapping[str, int]) -> Record:
        """SFT of θ₀ on a mixture, as the final one."""
        alone = (domain for domain, volume in volumes.items() if volume == self.problem.total)
        return self._tried(self.sft(dict(volumes), next(alone, "joint")))

    def short(self, mixtures: Sequence[Mapping[str, int]]) -> list[dict[str, float]]:
        """Each reference set's loss after SFT on each of some small mixtures, several at a time."""
        config = self.config
        volumes = [dict(mixture) for mixture in mixtures]
        stages = [training_stage(config, config.seed, each, self.base, self.data) for each in volumes]
        if self.store.missing(stages):
            with retrainers(config, self.cluster, self.base.folder, self.data.folder) as submit:
                pieces = [self._short(n, *each) for n, each in enumerate(zip(stages, volumes, strict=True))]
                for future in [submit(piece) for piece in pieces]:
                    future.result()
        losses = []
        for stage in stages:
            record = self.store.find(stage)
            assert record is not None
            losses.append(losses_after(self._tried(record)))
        return losses

    def _short(self, number: int, stage: Stage, volumes: dict[str, int]) -> Piece:
        seed = self.config.seed
        return lambda actor: self.stage(stage, f"mixture {number}", training(actor, volumes, seed, keep=False))

    def merged(self, models: Sequence[Record], shares: Sequence[Sequence[float]]) -> list[dict[str, float]]:
        """Each reference set's loss at weighted averages of trained models."""
        settings = {"shares": [list(each) for each in shares], "precision": self.config.influence.precision}
        inputs = {f"sft {number}": model.fingerprint for number, model in enumerate(models)}
        folders = [model.folder for model in models]
        found = self._proxy("merged", settings, inputs, lambda f, p: proxies.merged(self._work(p), folders, shares))
        losses: list[dict[str, float]] = found["losses"]
        return losses

    def doremi(self, reference: Record) -> dict[str, float]:
        """Each domain's share of the tokens by DoReMi."""
        methods = self.config.methods
        settings = {"rate": methods.doremi_rate, "smoothing": methods.doremi_smoothing}
        inputs = {"reference": reference.fingerprint}
        found = self._proxy("doremi", settings, inputs, lambda f, p: proxies.doremi(self._work(p), f, reference.folder))
        weights: dict[str, float] = found["weights"]
        return weights

    def doge(self) -> dict[str, float]:
        """Each domain's share of the tokens by DOGE."""
        settings = {"step": self.config.methods.doge_step}
        found = self._proxy("doge", settings, {}, lambda f, p: proxies.doge(self._work(p), f))
        weights: dict[str, float] = found["weights"]
        return weights

    def _work(self, progress: Reporter) -> proxies.Work:
        volumes = dict(self.problem.volumes)
        return proxies.Work(self.config, self.cluster, self.base.folder, self.data.folder, volumes, progress)

    def _proxy(
        self,
        kind: str,
        settings: dict[str, Any],
        inputs: dict[str, str],
        work: Callable[[Path, Reporter], dict[str, Any]],
    ) -> dict[str, Any]:
        shared = {"sft": self.config.sft.of_the_weights(), "seed": self.config.seed}
        shared["volumes"] = dict(self.problem.volumes)
        given = {"model": self.base.fingerprint, "data": self.data.fingerprint, **inputs}
        return self._tried(self.stage(Stage(kind, {**shared, **settings}, given), kind, work)).result

    def _tried(self, record: Record) -> Record:
        self.outcome.tried.append(record)
        return record
