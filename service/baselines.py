"""The other ways to choose a mixture (``ideal.methods``), on a cluster: what they ask for, as stages.

What a method trained to choose is what another may have trained before: Joint SFT is D0 and DoReMi's reference, and
the Specific SFT models are what `merge` averages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ideal.costs import PASSES
from ideal.domains import starting_volumes
from ideal.examples import ExampleSet
from ideal.methods import METHODS
from ideal.methods.problem import Problem
from ideal.methods.regmix import optimum
from service import proxies
from service.files import reference_file
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
        self.outcome = Outcome(self.data, read=self.read)
        found = self.data.result
        self.problem = Problem(
            config,
            starting_volumes(config, found),
            {domain: found[domain]["pool"] for domain in found},
            {domain: found[domain]["tokens_per_example"] for domain in found},
            {domain: self._reference_tokens(domain) for domain in found},
        )
        stopped = f"the mixture that `{config.method}` chose is trained"
        try:
            volumes = METHODS[config.method](self.problem, self)
            if any(volumes.values()):
                current = self.train(0, volumes, None, config.method)
            else:
                current = self.evaluate(self.base, 0, volumes, None, config.method)
                stopped = "the base model is scored, untrained"
            self.benchmark(current)
        finally:
            self.benchmarks.release()
        self.outcome.stopped = stopped
        self.happened(self.outcome)
        return self.outcome

    def trained(self, volumes: Mapping[str, int]) -> Record:
        """SFT of θ₀ on a mixture, as the final one."""
        used = [domain for domain, volume in volumes.items() if volume]
        unused = [domain for domain in volumes if domain not in used]
        name = "joint" if not unused else used[0] if len(used) == 1 else f"without {' '.join(unused)}"
        return self._tried(self.sft(dict(volumes), name))

    def losses(self, model: Record) -> dict[str, float]:
        """Each reference set's loss at a trained model."""
        found = self._tried(self.reference(model, f"{self.config.method} candidate")).result
        return {name: row["loss"] for name, row in found.items()}

    def short(self, mixtures: Sequence[Mapping[str, int]]) -> list[dict[str, float]]:
        """Each reference set's loss after SFT on each of some small mixtures, several at a time."""
        return [losses_after(record) for record in self._short(mixtures)]

    def _short(self, mixtures: Sequence[Mapping[str, int]]) -> list[Record]:
        config = self.config
        volumes = [dict(mixture) for mixture in mixtures]
        stages = [training_stage(config, config.seed, each, self.base, self.data) for each in volumes]
        if self.store.missing(stages):
            with retrainers(config, self.cluster, self.base.folder, self.data.folder) as submit:
                pieces = [self._piece(n, *each) for n, each in enumerate(zip(stages, volumes, strict=True))]
                for future in [submit(piece) for piece in pieces]:
                    future.result()
        found = [self.store.find(stage) for stage in stages]
        return [self._tried(record) for record in found if record]

    def _piece(self, number: int, stage: Stage, volumes: dict[str, int]) -> Piece:
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

    def regmix(self, mixtures: Sequence[Mapping[str, int]]) -> list[float]:
        """Each domain's share of the examples by RegMix; recorded, since a regression takes a while."""
        config, runs = self.config, self._short(mixtures)
        settings = {
            "regressor": config.methods.regmix_regressor,
            "weights": self.problem.weights.tolist(),
            "max_copies": config.equilibrium.max_copies,
            "pools": dict(self.problem.pools),
            "volumes": dict(self.problem.volumes),
            "seed": config.seed,
        }
        stage = Stage("regmix", settings, {f"run {number}": run.fingerprint for number, run in enumerate(runs)})

        def work(folder: Path, progress: Reporter) -> dict[str, Any]:
            progress(config.methods.regmix_regressor, 0, 1)
            return {"shares": optimum(self.problem, mixtures, [losses_after(run) for run in runs]), PASSES: 0}

        shares: list[float] = self._tried(self.stage(stage, "regmix", work)).result["shares"]
        return shares

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
        wanted = self.problem.weights.tolist()
        settings = {"drive": self.config.methods.doge_drive, "weights": wanted}
        found = self._proxy("doge", settings, {}, lambda f, p: proxies.doge(self._work(p), f, wanted))
        weights: dict[str, float] = found["weights"]
        return weights

    def _reference_tokens(self, domain: str) -> int:
        return int(ExampleSet.load(reference_file(self.data.folder, domain)).supervised_tokens().sum())

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
