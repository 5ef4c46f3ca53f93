"""Reference losses at averages of trained models: what the method `merge` searches among."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from ideal.config.config import Precision, SftConfig
from ideal.costs import FORWARD, PASSES, input_tokens
from service.stages.proxy import Here, on_a_worker, references
from service.stages.reference import losses_of
from service.stages.workers import Workers
from service.store.layout import MODEL
from service.store.stage import Record, Stage


class MergedResult(TypedDict):
    """By reference set (nats per supervised token), of every average."""

    losses: list[dict[str, float]]
    passes: int


@dataclass(frozen=True, kw_only=True)
class Merged(Stage[MergedResult]):
    """The losses of every reference set at weighted averages of models.

    Attributes:
        models: SFTs' records.
        shares: one of each model, for every average.
    """

    kind = "merged"
    version = 3
    models: list[Record[Any]]
    shares: list[list[float]]
    precision: Precision
    sft: SftConfig
    volumes: dict[str, int]
    seed: int
    base: Record[Any]
    data: Record[Any]

    def run(self, folder: Path, on: Workers) -> MergedResult:
        return on_a_worker(on, losses, self, what=self.kind)


def losses(stage: Merged, here: Here) -> MergedResult:
    """The evaluations in this process."""
    import torch

    from ideal.methods import merge
    from ideal.model.base import DTYPES, device, load_model
    from ideal.model.lora import whole_weights

    where = device()
    model = load_model(stage.base.folder / MODEL, DTYPES[stage.precision], where)
    exact = torch.float32 if stage.sft.lora else DTYPES[stage.sft.precision]  # adapters are less than bf16's steps
    read = [whole_weights(load_model(each.folder / MODEL, exact)) for each in stage.models]
    found = []
    for shares in stage.shares:
        merge.average(model, read, shares)
        tokens, progress = here.resources.batch_tokens, here.progress
        each = losses_of(model, stage.data.folder, stage.volumes, where, tokens, progress)
        found.append({domain: sum(nats) / sum(counts) for domain, (nats, counts) in each.items()})
    once = sum(input_tokens(reference) for reference in references(stage).values())
    return {"losses": found, PASSES: FORWARD * once * len(stage.shares)}
