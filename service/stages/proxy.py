"""What the proxy runs of DoReMi and DOGE share: training from θ₀ by one worker, with weights that change each step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar

import numpy as np

from ideal.config.config import ResourcesConfig, SftConfig
from ideal.costs import PASSES
from ideal.data.examples import ExampleSet
from service.cluster.progress import Reporter
from service.stages.workers import Workers
from service.store.layout import MODEL, reference_file, train_file
from service.store.stage import Record

if TYPE_CHECKING:
    from ideal.methods.proxy import Stepped
    from ideal.training.trainer import Trainer

EVERY_STEP = "weights.json"
R = TypeVar("R")


class ProxyResult(TypedDict):
    """Each domain's share of the tokens, the mean over steps; every step's go to ``weights.json``."""

    weights: dict[str, float]
    passes: int


class Proxy(Protocol):
    """A stage that trains a proxy; ``volumes`` is D0."""

    @property
    def sft(self) -> SftConfig: ...
    @property
    def volumes(self) -> Mapping[str, int]: ...
    @property
    def seed(self) -> int: ...
    @property
    def base(self) -> Record[Any]: ...
    @property
    def data(self) -> Record[Any]: ...


@dataclass(frozen=True)
class Here:
    """What a worker has for a proxy run."""

    resources: ResourcesConfig
    progress: Reporter

    def trainer(self, stage: Proxy) -> Trainer:
        """At θ₀."""
        from ideal.model.base import device
        from ideal.training.trainer import Trainer

        resources = self.resources
        model = stage.base.folder / MODEL
        return Trainer(model, stage.sft, device(), resources.batch_tokens, resources.gradient_checkpointing)

    def watched(self, stage: Proxy, found: Iterator[Stepped], folder: Path) -> ProxyResult:
        """The mean of a proxy's weights over its steps, and the passes that they took."""
        from ideal.training.trainer import number_of_steps

        total, every, passes = number_of_steps(sum(stage.volumes.values()), stage.sft), [], 0
        for number, each in enumerate(found):
            every.append(each.alpha.tolist())
            passes += each.passes
            self.progress(" ".join(f"{weight:.2f}" for weight in each.alpha), number + 1, total)
        (folder / EVERY_STEP).write_text(json.dumps(every))
        return {"weights": dict(zip(stage.volumes, np.mean(every, 0).tolist(), strict=True)), PASSES: passes}


def pools(stage: Proxy) -> dict[str, ExampleSet]:
    """Every domain's training examples."""
    return {domain: ExampleSet.load(train_file(stage.data.folder, domain)) for domain in stage.volumes}


def references(stage: Proxy) -> dict[str, ExampleSet]:
    """Every domain's reference set."""
    return {domain: ExampleSet.load(reference_file(stage.data.folder, domain)) for domain in stage.volumes}


def on_a_worker(on: Workers, work: Callable[..., R], stage: Proxy, *arguments: Any, what: str) -> R:
    """What ``work(stage, …, here)`` returns on one worker of SFT's size.

    Args:
        what: the stage, for errors.
    """
    here = Here(on.resources, on.progress)
    found: R = on.one(_seeded, work, on.cluster.sft_cpus, stage.seed, stage, *arguments, here, what=what)
    return found


def _seeded(work: Callable[..., R], cpus: int, seed: int, *arguments: Any) -> R:
    import torch

    from ideal.model.base import device

    torch.manual_seed(seed)
    if device().type == "cpu":
        torch.set_num_threads(cpus)
    return work(*arguments)
