"""What a run takes of its workers, and the layer blocks and shards with which it fits (``service.planning.memory``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, PretrainedConfig

from ideal.config.config import Config
from ideal.errors import BadInput
from ideal.model.lora import base_of
from service.cluster.cluster import Cluster
from service.planning.memory import (
    GIB,
    SUPERVISED,
    WIDTH,
    Sizes,
    pass_memory,
    reference_memory,
    sft_memory,
    sharded_memory,
    solve_memory,
    units,
)

USABLE = 0.85
"""Share of a device's memory that is planned with; the rest is for what a plan doesn't see."""


DAMPING = 2
"""Bytes of the optimiser's diagonal that SFT leaves for influence, by trained parameter."""

MASTER = 12
"""Bytes of SFT's state by trained parameter: weights and two moments in fp32."""


@dataclass(frozen=True)
class Plan:
    """Bytes and counts; ``service.planning.memory`` says what is in them.

    Attributes:
        layer_blocks: the config's, or about the fewest that fit (``filling``), or one for each worker where none do.
        sharded: whether SFT is divided among its workers, because the config says so or one can't hold it all.
        sft: of one SFT worker.
        sft_available: what one has.
        reference: of the worker that computes the reference loss.
        influence_pass: of one influence actor in its pass.
        influence_solve: of one influence actor in its solve.
        available: what one has.
        workers: that influence has; layer blocks × shards of them are used.
        scratch: on disk, while an influence is computed.
        state: on disk, while SFT runs: what it can go on from, and the next of these while that is written.
        checkpoint: on disk, for good, of one SFT.
        checkpoints: of all iterations together.
    """

    parameters: int
    tracked: int
    layer_blocks: int
    sharded: bool
    sft: int
    sft_available: int
    reference: int
    influence_pass: int
    influence_solve: int
    available: int
    workers: int
    scratch: int
    state: int
    checkpoint: int
    checkpoints: int

    @property
    def influence(self) -> int:
        """Of one influence actor at its fullest."""
        return max(self.influence_pass, self.influence_solve)

    @property
    def shards(self) -> int:
        """Parts that the data is cut in."""
        return max(1, self.workers // self.layer_blocks)

    @property
    def sft_fits(self) -> bool:
        return self.sft <= self.sft_available

    @property
    def influence_fits(self) -> bool:
        """In memory, with a worker for each layer block."""
        return self.influence <= self.available and self.layer_blocks <= self.workers


def plan(config: Config, shapes: PretrainedConfig, cluster: Cluster, device_memory: int | None = None) -> Plan:
    """Memory and disk of a run that fits.

    Args:
        shapes: the model's configuration.
        device_memory: bytes of one worker's device or share of the machine. Default: this machine's.

    Raises:
        BadInput: SFT, the reference loss or, where the method has an influence, its pass in any number of layer blocks
            or its solve doesn't fit.
    """
    found = estimate(config, shapes, cluster, device_memory)
    if not found.sft_fits and config.method != "base":
        raise BadInput(
            "model.source",
            f"SFT of {found.parameters / 1e9:.2f} B parameters needs {found.sft / GIB:.1f} GiB in each worker, "
            f"which has {found.sft_available / GIB:.1f} GiB",
            f"{'' if config.sft.lora else 'train adapters (sft.lora), use more workers (they share it), '}"
            "take a smaller model, fewer resources.batch_tokens, or resources.gradient_checkpointing",
        )
    if found.reference > found.sft_available:
        raise BadInput(
            "model.source",
            f"the reference loss needs {found.reference / GIB:.1f} GiB in one worker, which has "
            f"{found.sft_available / GIB:.1f} GiB",
            "take a smaller model, or fewer resources.batch_tokens",
        )
    if config.method != "equilibrium":
        return found
    if found.influence_solve > found.available:
        raise BadInput(
            "influence.layers",
            f"the solve needs {found.influence_solve / GIB:.1f} GiB in each worker, which has "
            f"{found.available / GIB:.1f} GiB",
            "track fewer or smaller layers, lower resources.batch_tokens, or use a larger device",
        )
    if found.influence_pass > found.available and not config.resources.layer_blocks:
        raise BadInput(
            "influence.layers",
            f"a pass in {found.layer_blocks} layer blocks needs {found.influence_pass / GIB:.1f} GiB in each worker, "
            f"which has {found.available / GIB:.1f} GiB",
            "lower resources.batch_tokens, or track fewer layers",
        )
    return found


def estimate(
    config: Config,
    shapes: PretrainedConfig,
    cluster: Cluster,
    device_memory: int | None = None,
    supervised: float = SUPERVISED,
) -> Plan:
    """Memory and disk of a run, whether it fits or not.

    Args:
        shapes, cluster, device_memory: as ``plan`` has them.
        supervised: share of a batch's tokens.
    """
    sizes = Sizes.of(shapes, config.influence.layers, config.sft.lora)
    available = int(USABLE * (device_memory or worker_memory(cluster, cluster.influence_workers)))
    for_sft = int(USABLE * (device_memory or worker_memory(cluster, cluster.sft_workers)))
    counts = range(1, len(sizes.tracked) + 1)
    fitting = (n for n in counts if pass_memory(config, sizes, n, supervised) <= available)
    blocks = config.resources.layer_blocks or filling(
        next(fitting, cluster.influence_workers), cluster.influence_workers
    )
    blocks = min(blocks, len(sizes.tracked))
    tracked = sizes.tracked_weights
    workers = cluster.sft_workers
    mean = 4 * sizes.trained if config.influence.averaged and not cluster.gpus else 0
    whole = sft_memory(config, sizes, supervised) + mean
    sharded = config.resources.shard == "always" or (
        config.resources.shard == "auto" and not config.sft.lora and workers > 1 and whole > for_sft
    )
    if sharded:
        reading = 0 if cluster.gpus else 4 * sizes.parameters
        whole = max(reading, sharded_memory(config, sizes, supervised, workers) + mean // workers)
    copies = 2 if config.influence.averaged else 1
    kept = WIDTH[config.influence.precision] if config.influence.joint else 0
    checkpoint = sizes.trained * (WIDTH[config.sft.precision] * copies + DAMPING)
    state = sizes.trained * (MASTER + (WIDTH["fp32"] if config.influence.averaged else 0))
    return Plan(
        sizes.parameters,
        tracked,
        blocks,
        sharded,
        whole,
        for_sft,
        reference_memory(config, sizes, supervised),
        pass_memory(config, sizes, blocks, supervised),
        solve_memory(config, sizes, supervised),
        available,
        cluster.influence_workers,
        tracked * 2 * (4 * units(config) + kept * len(config.domains)),
        2 * state,
        checkpoint,
        (config.equilibrium.iterations + 1) * checkpoint,
    )


def layer_blocks(config: Config, model: Path, cluster: Cluster) -> int:
    """Parts to cut the tracked layers in: the config's number, or as few as fit in memory."""
    shapes = AutoConfig.from_pretrained(base_of(model))
    return config.resources.layer_blocks or plan(config, shapes, cluster).layer_blocks


def shards_training(config: Config, model: Path, cluster: Cluster) -> bool:
    """Whether SFT of a model folder is divided among its workers."""
    return estimate(config, AutoConfig.from_pretrained(model), cluster).sharded


def filling(blocks: int, workers: int) -> int:
    """The most layer blocks that leave each as many workers as this many: no worker is idle that could take one."""
    return workers // (workers // blocks) if blocks <= workers else blocks


def worker_memory(cluster: Cluster, workers: int) -> int:
    """Bytes of one of so many workers at a time: a GPU's, or its share of the machine's that has most of them."""
    if cluster.gpus and cluster.memory:
        return cluster.memory
    if cluster.gpus and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    beside = min(workers, max(1, cluster.cpus // cluster.nodes))
    return (cluster.memory or psutil.virtual_memory().total) // beside
