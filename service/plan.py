"""What a run will take, from the model's shapes alone: memory of each worker, and the layer blocks that fit it.

Bytes: SFT keeps every parameter in the model's precision, and master weights, gradient sums and two moments in fp32.
An influence actor keeps the model, its layers' factors and one block's gradient in fp32; then, a layer at a time, all
reference blocks' gradients and the layer's eigenvectors in fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ideal.config import Config
from ideal.curvature.layers import input_group, layer_shapes
from ideal.errors import BadInput
from service.cluster import Cluster

GIB = 2**30
USABLE = 0.85
"""Share of a device's memory that is planned with; the rest is for what a plan doesn't see."""


@dataclass(frozen=True)
class Plan:
    """Bytes and counts; see the module's docstring for what is in them.

    Attributes:
        sft_available: of one SFT worker.
        available: of one influence worker.
        scratch: on disk, while an influence is computed.
        checkpoints: on disk, for good, all iterations together.
    """

    parameters: int
    tracked: int
    layer_blocks: int
    sft: int
    sft_available: int
    influence: int
    available: int
    scratch: int
    checkpoints: int


def plan(config: Config, shapes: PretrainedConfig, cluster: Cluster, device_memory: int | None = None) -> Plan:
    """Memory and disk of a run.

    Args:
        shapes: the model's configuration.
        device_memory: bytes of one worker's device or share of the machine. Default: this machine's.

    Raises:
        BadInput: SFT or a single layer's influence doesn't fit.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes)  # type: ignore[no-untyped-call]
        parameters = sum(p.numel() for p in model.parameters())
    layers = layer_shapes(shapes, config.influence.layers)
    available = int(USABLE * (device_memory or worker_memory(cluster, cluster.influence_workers)))
    for_sft = int(USABLE * (device_memory or worker_memory(cluster, cluster.sft_workers)))
    width = 2 if config.sft.precision == "bf16" else 4
    tokens = config.resources.batch_tokens
    hidden, vocabulary = shapes.hidden_size, shapes.vocab_size
    activations = (
        tokens * hidden * shapes.num_hidden_layers * width * (4 if config.resources.gradient_checkpointing else 34)
    )
    logits = tokens * vocabulary * 4
    sft = parameters * (width + 16) + activations + logits
    if sft > for_sft:
        raise BadInput(
            "model.source",
            f"SFT of {parameters / 1e9:.2f} B parameters needs {sft / GIB:.1f} GiB in each worker, "
            f"which has {for_sft / GIB:.1f} GiB",
            "take a smaller model, lower resources.batch_tokens, or set resources.gradient_checkpointing",
        )
    fixed = parameters * width + activations + logits
    blocks = _blocks(config, layers, available - fixed)
    per_block = math.ceil(len(layers) / blocks)
    kept = _accumulators(dict(list(layers.items())[:per_block]))
    gradients = sum(rows * columns for rows, columns in layers.values()) * 4
    sets = 2 * len(config.domains) * config.influence.blocks
    return Plan(
        parameters,
        sum(rows * columns for rows, columns in layers.values()),
        blocks,
        sft,
        for_sft,
        fixed + kept,
        available,
        gradients * sets,
        (config.equilibrium.iterations + 1) * parameters * width,
    )


def layer_blocks(config: Config, model: Path, cluster: Cluster) -> int:
    """Parts to cut the tracked layers in: the config's number, or as few as fit in memory."""
    return config.resources.layer_blocks or plan(config, AutoConfig.from_pretrained(model), cluster).layer_blocks


def worker_memory(cluster: Cluster, workers: int) -> int:
    """Bytes of one of so many workers at a time: a GPU's, or its share of this machine's."""
    if cluster.gpus and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return psutil.virtual_memory().total // workers


def _blocks(config: Config, layers: dict[str, tuple[int, int]], room: int) -> int:
    """The fewest layer blocks whose factors and gradient fit in ``room`` bytes."""
    if config.resources.layer_blocks:
        return config.resources.layer_blocks
    rows, columns = max(layers.values(), key=lambda shape: max(shape))
    units = len(config.domains) * config.influence.blocks
    solving = (units + 2) * rows * columns * 4 + 3 * 8 * (rows * rows + columns * columns)
    if solving > room:
        raise BadInput(
            "influence.layers",
            f"solving one {rows}×{columns} layer needs {solving / GIB:.1f} GiB, {max(room, 0) / GIB:.1f} GiB are left",
            "lower influence.blocks, track smaller layers, or use a larger device",
        )
    names = list(layers)
    for blocks in range(1, len(names) + 1):
        size = math.ceil(len(names) / blocks)
        parts = [names[i : i + size] for i in range(0, len(names), size)]
        if max(_accumulators({name: layers[name] for name in part}) for part in parts) <= room:
            return blocks
    raise BadInput("influence.layers", "a single layer's factors don't fit in memory", "track smaller layers")


def _accumulators(layers: dict[str, tuple[int, int]]) -> int:
    """Bytes of the factors and one gradient of these layers, fp32."""
    inputs = {input_group(name): columns for name, (_, columns) in layers.items()}
    factors = sum(rows * rows for rows, _ in layers.values()) + sum(c * c for c in inputs.values())
    return 4 * (factors + sum(rows * columns for rows, columns in layers.values()))
