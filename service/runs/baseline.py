"""The other ways to choose a mixture (``ideal.methods``), on a cluster: what they ask for, as stages.

What a method trained to choose is what another may have trained before: Joint SFT is D0 and DoReMi's reference, and
the Specific SFT models are what `merge` averages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ideal.config.config import Config
from ideal.data.domains import starting_volumes
from ideal.data.examples import ExampleSet
from ideal.methods import METHODS
from ideal.methods.problem import Problem
from service.outcome import Outcome
from service.runs.mixtures import Mixtures
from service.runs.runner import Runner, side_by_side
from service.stages import regmix
from service.stages.doge import Doge
from service.stages.doremi import DoReMi
from service.stages.merged import Merged
from service.stages.regmix import RegMix
from service.stages.retraining import Retraining, losses_after
from service.store.layout import reference_file
from service.store.stage import R_co, Record, Stage


def baseline(config: Config, run: Runner, happened: Callable[[Outcome], None] = lambda outcome: None) -> Outcome:
    """Choose a mixture by a method that isn't `equilibrium`, train on it, score it.

    Args:
        happened: called with the outcome so far after every change of it.

    Raises:
        BadInput: something in the config or the data doesn't hold.
    """
    mixtures = Mixtures(config, run, happened)
    found = mixtures.data.result
    problem = Problem(
        config,
        starting_volumes(config, found),
        {domain: found[domain]["pool"] for domain in found},
        {domain: found[domain]["tokens_per_example"] for domain in found},
        {domain: _reference_tokens(mixtures, domain) for domain in found},
    )
    volumes = METHODS[config.method](problem, Asked(mixtures, problem))
    if any(volumes.values()):
        current = mixtures.train(0, volumes, None, config.method)
        stopped = f"the mixture that `{config.method}` chose is trained"
    else:
        current = mixtures.evaluate(mixtures.base, 0, volumes, None, config.method)
        stopped = "the base model is scored, untrained"
    mixtures.benchmark(current)
    return mixtures.end(stopped)


class Asked:
    """What a method asks for (``ideal.methods.problem.Stages``); all of it counts as its search."""

    def __init__(self, mixtures: Mixtures, problem: Problem) -> None:
        self.mixtures, self.problem = mixtures, problem
        self.config, self.base, self.data = mixtures.config, mixtures.base, mixtures.data

    def trained(self, volumes: Mapping[str, int]) -> Record[Any]:
        """SFT of θ₀ on a mixture, as the final one."""
        used = [domain for domain, volume in volumes.items() if volume]
        unused = [domain for domain in volumes if domain not in used]
        name = "joint" if not unused else used[0] if len(used) == 1 else f"without {' '.join(unused)}"
        return self._counted(self.mixtures.sft(dict(volumes), name))

    def losses(self, model: Record[Any]) -> dict[str, float]:
        """Each reference set's loss at a trained model."""
        found = self._counted(self.mixtures.reference(model, f"{self.config.method} candidate")).result
        return {name: row["loss"] for name, row in found.items()}

    def short(self, mixtures: Sequence[Mapping[str, int]]) -> list[dict[str, float]]:
        """Each reference set's loss after SFT on each of some small mixtures, several at a time."""
        return [losses_after(record) for record in self._short(mixtures)]

    def _short(self, mixtures: Sequence[Mapping[str, int]]) -> list[Record[dict[str, Any]]]:
        run, config = self.mixtures.run, self.config

        def training(number: int, volumes: Mapping[str, int]) -> Record[dict[str, Any]]:
            stage = Retraining(
                sft=config.sft,
                averaged=0.0,
                volumes=dict(volumes),
                seed=config.seed,
                keep=False,
                base=self.base,
                data=self.data,
            )
            return run(stage, f"mixture {number}")

        calls = [partial(training, *each) for each in enumerate(mixtures)]
        return [self._counted(record) for record in side_by_side(calls, run.at_once.trainings)]

    def merged(self, models: Sequence[Record[Any]], shares: Sequence[Sequence[float]]) -> list[dict[str, float]]:
        """Each reference set's loss at weighted averages of trained models."""
        every = [list(each) for each in shares]
        stage = Merged(models=list(models), shares=every, precision=self.config.influence.precision, **self._proxy())
        return self._found(stage)["losses"]

    def regmix(self, mixtures: Sequence[Mapping[str, int]]) -> list[float]:
        """Each domain's share of the examples by RegMix."""
        runs = self._short(mixtures)
        volumes = [dict(each) for each in mixtures]
        return self._found(RegMix(problem=regmix.identified(self.problem), mixtures=volumes, runs=runs))["shares"]

    def doremi(self, reference: Record[Any]) -> dict[str, float]:
        """Each domain's share of the tokens by DoReMi."""
        rate, smoothing = self.config.methods.doremi_rate, self.config.methods.doremi_smoothing
        return self._found(DoReMi(rate=rate, smoothing=smoothing, reference=reference, **self._proxy()))["weights"]

    def doge(self) -> dict[str, float]:
        """Each domain's share of the tokens by DOGE."""
        wanted = self.problem.weights.tolist()
        return self._found(Doge(drive=self.config.methods.doge_drive, wanted=wanted, **self._proxy()))["weights"]

    def _proxy(self) -> dict[str, Any]:
        return {
            "sft": self.config.sft,
            "volumes": dict(self.problem.volumes),
            "seed": self.config.seed,
            "base": self.base,
            "data": self.data,
        }

    def _found(self, stage: Stage[R_co]) -> R_co:
        return self._counted(self.mixtures.run(stage, stage.kind)).result

    def _counted(self, record: Record[R_co]) -> Record[R_co]:
        self.mixtures.outcome.tried.append(record)
        return record


def _reference_tokens(mixtures: Mixtures, domain: str) -> int:
    return int(ExampleSet.load(reference_file(mixtures.data.folder, domain)).supervised_tokens().sum())
