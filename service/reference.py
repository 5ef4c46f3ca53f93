"""The loss on every reference set: what the optimisation minimises, and what accepts or rejects a mixture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
import torch
from torch import nn

from ideal.config import Config
from ideal.costs import FORWARD, PASSES, input_tokens
from ideal.examples import ExampleSet
from ideal.model import DTYPES, device, load_model
from ideal.training import example_losses
from service.cluster import Cluster, on_one_worker
from service.files import MODEL, reference_file
from service.progress import Reporter

BY_EXAMPLE = "losses.json"
Losses = dict[str, tuple[list[float], list[int]]]
"""By reference set: each example's loss, summed over its supervised tokens (nats), and how many those are."""


def reference_losses(
    folder: Path,
    *,
    checkpoint: Path,
    data: Path,
    domains: list[str],
    config: Config,
    cluster: Cluster,
    progress: Reporter,
) -> dict[str, Any]:
    """Each set's loss (mean per supervised token, nats), tokens and passes; each example's loss goes to ``folder``."""
    arguments = (checkpoint / MODEL, data, domains, config, cluster.sft_cpus, progress)
    seconds = config.resources.wait_seconds
    found: Losses = on_one_worker(_losses, *arguments, cluster=cluster, seconds=seconds, what="reference loss")
    (folder / BY_EXAMPLE).write_text(json.dumps(found))
    return means(found, data)


@ray.remote
def _losses(
    model_folder: Path, data: Path, domains: list[str], config: Config, cpus: int, progress: Reporter
) -> Losses:
    where = device()
    if where.type == "cpu":
        torch.set_num_threads(cpus)
    model = load_model(model_folder, DTYPES[config.influence.precision], where)
    return losses_of(model, data, domains, where, config.resources.batch_tokens, progress)


def losses_of(
    model: nn.Module, data: Path, domains: Iterable[str], where: torch.device, batch_tokens: int, progress: Reporter
) -> Losses:
    """A model's losses on every example of each domain's reference set."""
    found = {}
    names = list(domains)
    for number, domain in enumerate(names):
        progress(domain, number, len(names))
        found[domain] = example_losses(model, ExampleSet.load(reference_file(data, domain)), where, batch_tokens)
    return found


def means(losses: Losses, data: Path) -> dict[str, Any]:
    """Each set's loss (mean per supervised token, nats), supervised tokens, and passes that it took."""
    return {
        name: {
            "loss": sum(each) / sum(tokens),
            "tokens": sum(tokens),
            PASSES: FORWARD * input_tokens(ExampleSet.load(reference_file(data, name))),
        }
        for name, (each, tokens) in losses.items()
    }
