"""The proxy runs of DoReMi and DOGE, and the averages that `merge` evaluates: each by one worker of SFT's size.

The weights of every step go to ``weights.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from ideal.config import Config
from ideal.costs import FORWARD, PASSES, input_tokens
from ideal.examples import ExampleSet
from ideal.lora import whole_weights
from ideal.methods import doge as doge_method
from ideal.methods import doremi as doremi_method
from ideal.methods import merge as merge_method
from ideal.methods.proxy import Stepped
from ideal.model import DTYPES, device, load_model
from ideal.training import Trainer, number_of_steps
from service.cluster import Cluster, on_one_worker
from service.files import MODEL, reference_file, train_file
from service.progress import Reporter
from service.reference import losses_of

EVERY_STEP = "weights.json"


@dataclass(frozen=True)
class Work:
    """What every proxy run starts from; ``base`` and ``data`` are stage folders, ``volumes`` is D0."""

    config: Config
    cluster: Cluster
    base: Path
    data: Path
    volumes: dict[str, int]
    progress: Reporter

    @property
    def total(self) -> int:
        return sum(self.volumes.values())

    def trainer(self) -> Trainer:
        """At θ₀."""
        resources = self.config.resources
        where, tokens = device(), resources.batch_tokens
        return Trainer(self.base / MODEL, self.config.sft, where, tokens, resources.gradient_checkpointing)

    def pools(self) -> dict[str, ExampleSet]:
        return {domain: ExampleSet.load(train_file(self.data, domain)) for domain in self.volumes}

    def references(self) -> dict[str, ExampleSet]:
        return {domain: ExampleSet.load(reference_file(self.data, domain)) for domain in self.volumes}


def doremi(work: Work, folder: Path, reference: Path) -> dict[str, Any]:
    """DoReMi's weights, given the Joint SFT's stage folder.

    Returns:
        weights (each domain's share of the tokens, the mean over steps), passes.
    """
    return _on_a_worker(work, _doremi, folder, reference)


def doge(work: Work, folder: Path, wanted: list[float]) -> dict[str, Any]:
    """DOGE's weights.

    Args:
        wanted: each reference set's weight in what is minimised.

    Returns:
        weights (each domain's share of the tokens, the mean over steps), passes.
    """
    return _on_a_worker(work, _doge, folder, wanted)


def merged(work: Work, models: Sequence[Path], shares: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Reference losses at averages of trained models.

    Args:
        models: SFT's stage folders.
        shares: one of each model, for every average.

    Returns:
        losses (by reference set, of every average), passes.
    """
    return _on_a_worker(work, _merged, list(models), shares)


def _on_a_worker(work: Work, what: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    config, cluster = work.config, work.cluster
    seconds = config.resources.wait_seconds
    found: dict[str, Any] = on_one_worker(
        _task, what, work, *arguments, cluster=cluster, seconds=seconds, what=config.method
    )
    return found


@ray.remote
def _task(what: Callable[..., dict[str, Any]], work: Work, *arguments: Any) -> dict[str, Any]:
    torch.manual_seed(work.config.seed)
    if device().type == "cpu":
        torch.set_num_threads(work.cluster.sft_cpus)
    return what(work, *arguments)


def _doremi(work: Work, folder: Path, reference: Path) -> dict[str, Any]:
    config, pools = work.config, work.pools()
    compared = load_model(reference / MODEL, DTYPES[config.sft.precision], device())
    rate, smoothing = config.methods.doremi_rate, config.methods.doremi_smoothing
    found = doremi_method.weights(work.trainer(), compared, pools, work.total, config.seed, rate, smoothing)
    return _watched(work, found, folder)


def _doge(work: Work, folder: Path, wanted: list[float]) -> dict[str, Any]:
    config, pools, references = work.config, work.pools(), work.references()
    weights, drive = np.array(wanted), config.methods.doge_drive
    found = doge_method.weights(work.trainer(), pools, references, weights, work.total, config.seed, drive)
    return _watched(work, found, folder)


def _merged(work: Work, models: list[Path], shares: Sequence[Sequence[float]]) -> dict[str, Any]:
    config, where = work.config, device()
    model = load_model(work.base / MODEL, DTYPES[config.influence.precision], where)
    exact = torch.float32 if config.sft.lora else DTYPES[config.sft.precision]  # adapters are less than bf16's steps
    read = [whole_weights(load_model(folder / MODEL, exact)) for folder in models]
    losses = []
    for each in shares:
        merge_method.average(model, read, each)
        found = losses_of(model, work.data, work.volumes, where, config.resources.batch_tokens, work.progress)
        losses.append({domain: sum(each) / sum(tokens) for domain, (each, tokens) in found.items()})
    once = sum(input_tokens(reference) for reference in work.references().values())
    return {"losses": losses, PASSES: FORWARD * once * len(shares)}


def _watched(work: Work, found: Iterator[Stepped], folder: Path) -> dict[str, Any]:
    """The mean of a proxy's weights over its steps, and the passes that they took."""
    total, every, passes = number_of_steps(work.total, work.config.sft), [], 0
    for number, each in enumerate(found):
        every.append(each.alpha.tolist())
        passes += each.passes
        work.progress(" ".join(f"{weight:.2f}" for weight in each.alpha), number + 1, total)
    (folder / EVERY_STEP).write_text(json.dumps(every))
    return {"weights": dict(zip(work.volumes, np.mean(every, 0).tolist(), strict=True)), PASSES: passes}
