"""The loss on every reference set: what the optimisation minimises, and what accepts or rejects a mixture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ideal.config.config import Precision
from ideal.costs import FORWARD, PASSES, input_tokens
from ideal.data.examples import ExampleSet
from service.cluster.progress import Reporter
from service.stages.workers import Workers
from service.store.layout import MODEL, reference_file
from service.store.stage import Record, Stage

if TYPE_CHECKING:
    import torch
    from torch import nn

BY_EXAMPLE = "losses.json"
Losses = dict[str, tuple[list[float], list[int]]]
"""By reference set: each example's loss, summed over its supervised tokens (nats), and how many those are."""


class SetLoss(TypedDict):
    """A reference set's mean loss (nats per supervised token), its supervised tokens, and the passes it took."""

    loss: float
    tokens: int
    passes: int


@dataclass(frozen=True, kw_only=True)
class ReferenceLoss(Stage[dict[str, SetLoss]]):
    """The loss of every reference set at a model; each example's goes to ``losses.json``.

    Attributes:
        model: an SFT's record, or the base model's.
    """

    kind = "reference"
    version = 3
    precision: Precision
    model: Record[Any]
    data: Record[Any]

    def run(self, folder: Path, on: Workers) -> dict[str, SetLoss]:
        arguments = (self.model.folder / MODEL, self.data.folder, list(self.data.result), self.precision)
        cpus, tokens = on.cluster.sft_cpus, on.resources.batch_tokens
        found = on.one(_losses, *arguments, tokens, cpus, on.progress, what="reference loss")
        (folder / BY_EXAMPLE).write_text(json.dumps(found))
        return means(found, self.data.folder)


def _losses(
    model_folder: Path,
    data: Path,
    domains: list[str],
    precision: Precision,
    batch_tokens: int,
    cpus: int,
    progress: Reporter,
) -> Losses:
    import torch

    from ideal.model.base import DTYPES, device, load_model

    where = device()
    if where.type == "cpu":
        torch.set_num_threads(cpus)
    model = load_model(model_folder, DTYPES[precision], where)
    return losses_of(model, data, domains, where, batch_tokens, progress)


def losses_of(
    model: nn.Module, data: Path, domains: Iterable[str], where: torch.device, batch_tokens: int, progress: Reporter
) -> Losses:
    """A model's losses on every example of each domain's reference set."""
    from ideal.training.trainer import example_losses

    found = {}
    names = list(domains)
    for number, domain in enumerate(names):
        progress(domain, number, len(names))
        found[domain] = example_losses(model, ExampleSet.load(reference_file(data, domain)), where, batch_tokens)
    return found


def means(losses: Losses, data: Path) -> dict[str, SetLoss]:
    """Each set's mean loss and what it took."""
    return {
        name: {
            "loss": sum(each) / sum(tokens),
            "tokens": sum(tokens),
            PASSES: FORWARD * input_tokens(ExampleSet.load(reference_file(data, name))),
        }
        for name, (each, tokens) in losses.items()
    }
