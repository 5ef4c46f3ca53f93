"""What every way to choose a mixture is made of: θ₀ and the data, SFT on a mixture, its losses, its scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from ideal.config.config import Config
from ideal.config.inputs import BenchmarkConfig
from ideal.data.domains import check_rejected
from service.cluster.engines import longest_first
from service.outcome import Iteration, Outcome, as_one
from service.runs.runner import Runner, side_by_side
from service.stages import base_model, benchmark, data, examples
from service.stages.base_model import BaseModel, BaseModelResult
from service.stages.benchmark import Benchmark, Score
from service.stages.data import Data, DomainData
from service.stages.examples import Examples
from service.stages.reference import ReferenceLoss, SetLoss
from service.stages.sft import Sft, SftResult
from service.store.stage import Record
from service.store.store import Unfinished


class Inputs:
    """The base model and the examples of a config.

    Attributes:
        read: the examples before what is held out was removed.
        data: the others. Its fingerprint is their content, so that what changes none of them changes no stage.

    Raises:
        BadInput: a source has too many unusable rows, or nothing that isn't held out.
        ValueError: a precision is still `auto`, which no fingerprint may hold.
    """

    def __init__(self, config: Config, run: Runner) -> None:
        if config.undecided:
            raise ValueError("a precision is still `auto`: service.cluster.precision.decide must come first")
        self.base: Record[BaseModelResult] = run(
            BaseModel(model=base_model.identified(config.model, run.checksum)), "base model"
        )
        domains = examples.identified(config.domains, run.checksum)
        self.read = run(Examples(domains=domains, max_tokens=config.model.max_tokens, base=self.base), "examples")
        check_rejected(self.read.result, config.max_rejected)
        asked = data.identified(config.benchmarks, run.checksum)
        cleaned = run(Data(benchmarks=asked, examples=self.read), "data")
        self.data: Record[dict[str, DomainData]] = replace(cleaned, fingerprint=data.content(cleaned.result))


class Mixtures:
    """Mixtures of a config, trained and scored one after another.

    Args:
        happened: called with the outcome so far after every change of it.
    """

    def __init__(self, config: Config, run: Runner, happened: Callable[[Outcome], None]) -> None:
        self.config, self.run, self.happened = config, run, happened
        inputs = Inputs(config, run)
        self.base, self.data = inputs.base, inputs.data
        self.outcome = Outcome(self.data, read=inputs.read)

    def sft(self, volumes: dict[str, int], name: str) -> Record[SftResult]:
        """SFT of θ₀ on a mixture."""
        config = self.config
        stage = Sft(
            sft=config.sft,
            averaged=config.influence.averaged,
            volumes=volumes,
            seed=config.seed,
            base=self.base,
            data=self.data,
        )
        return self.run(stage, f"{name} SFT")

    def reference(self, model: Record[Any], name: str) -> Record[dict[str, SetLoss]]:
        """The losses on every reference set at an SFT's model, or at the base model."""
        stage = ReferenceLoss(precision=self.config.influence.precision, model=model, data=self.data)
        return self.run(stage, f"{name} reference")

    def train(self, number: int, volumes: dict[str, int], m: float | None, method: str = "") -> Iteration:
        """SFT on a mixture, and its reference loss: the next iteration."""
        return self.evaluate(self.sft(volumes, method or f"D{number}"), number, volumes, m, method)

    def evaluate(
        self, model: Record[Any], number: int, volumes: dict[str, int], m: float | None, method: str = ""
    ) -> Iteration:
        """A model's reference loss: the next iteration."""
        losses = self.reference(model, method or f"D{number}")
        iteration = Iteration(number, volumes, m, model, losses, self._objective(losses), method=method)
        self.outcome.iterations.append(iteration)
        self.happened(self.outcome)
        return iteration

    def benchmark(self, current: Iteration) -> None:
        """Scores at an iteration's checkpoint, each a stage, by as many engines at a time as there are."""
        order = longest_first(self.config.benchmarks)
        calls = [partial(self._score, current, each) for each in order]
        try:
            records = side_by_side(calls, self.run.at_once.benchmarks)
        finally:
            self.run.scored()
        found = {b.name: record for b, record in zip(order, records, strict=True) if isinstance(record, Record)}
        current.scored = {b.name: found[b.name] for b in self.config.benchmarks if b.name in found}
        for record in records:
            if isinstance(record, Unfinished):
                raise record
        current.benchmark = as_one(current.scored)
        self.happened(self.outcome)

    def end(self, reason: str) -> Outcome:
        """The outcome, at its end."""
        self.outcome.stopped = reason
        self.happened(self.outcome)
        return self.outcome

    def _score(self, current: Iteration, settings: BenchmarkConfig) -> Record[Score] | Unfinished:
        """A benchmark's record; where nothing runs and it has none, the others' are looked up all the same."""
        config = self.config
        stage = Benchmark(
            benchmark=benchmark.identified(settings, self.run.checksum),
            max_tokens=config.model.max_tokens,
            seed=config.seed,
            model=current.sft,
        )
        try:
            return self.run(stage, f"{current.name} benchmark {settings.name}")
        except Unfinished as error:
            return error

    def _objective(self, losses: Record[dict[str, SetLoss]]) -> float:
        rows = list(losses.result.values())
        weights = [row["tokens"] if self.config.equilibrium.objective == "micro" else 1 for row in rows]
        return float(sum(row["loss"] * w for row, w in zip(rows, weights, strict=True)) / sum(weights))
