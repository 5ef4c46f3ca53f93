"""How long each stage takes, from the model's shapes: multiplications through a rate, AdamW's passes over its vectors
through the memory's.

On this machine the rates are measured, in seconds; of a machine that isn't here they are assumed. Not in it:
attention's own products (2 % at 256 tokens), files, the start of workers.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from ideal.config.config import Config
from ideal.influence.joint import at_once
from ideal.influence.layers import input_group
from ideal.influence.solvers import FACTORED, needs_factors
from ideal.model import base as models
from service.cluster import cluster
from service.planning.memory import WIDTH, Sizes, batch, depth, units
from service.planning.partition import Layers, by_cost, cut

UPDATE_BYTES = 60
"""Memory traffic of one optimiser step by parameter: division, norm, clipping, AdamW and the copy back."""

EIGEN = 10
"""Multiplications of one eigen-decomposition, in d³."""

SYMMETRIC = 5 / 8
"""Share of a factor's products that is computed."""

INVERSE = 1
"""And of one inverse by Cholesky's."""


@dataclass(frozen=True)
class Rates:
    """How fast one worker is, by the second.

    Attributes:
        model: flops of the model's forward and backward, in its precision.
        products: flops of fp32 products.
        eigen: flops of fp64 eigen-decompositions, at 10 d³ each.
        inverse: flops of fp64 inverses, at d³ each.
        memory: bytes read or written.
        link: bytes of gradients that workers add up.
    """

    model: float
    products: float
    eigen: float
    inverse: float
    memory: float
    link: float

    def __str__(self) -> str:
        return (
            f"{self.model / 1e12:.3g} TFLOP/s in the model's passes, {self.products / 1e12:.3g} in fp32, "
            f"{self.eigen / 1e12:.2g} in fp64 eigen-decompositions (10 d³), {self.inverse / 1e12:.2g} in fp64 inverses "
            f"(d³), memory {self.memory / 1e9:.0f} GB/s"
        )


ABSENT_GPU = Rates(400e12, 40e12, 1e12, 10e12, 2e12, 200e9)
"""A data-centre GPU of 2023 at 40 % of its bf16 peak. Assumed, not measured."""


@dataclass(frozen=True)
class Work:
    """Examples in the first mixture and in all reference sets, and tokens of each, prompts included."""

    volumes: list[int]
    reference: int
    tokens: int


@dataclass(frozen=True)
class Seconds:
    """Of each stage, once."""

    sft: float
    reference: float
    influence_pass: float
    influence_solve: float


def seconds(
    config: Config,
    sizes: Sizes,
    machine: cluster.Cluster,
    blocks: int,
    work: Work,
    alone: Rates,
    together: Rates,
    sharded: bool = False,
) -> Seconds:
    """Time of each stage.

    Args:
        alone: rates of an influence actor.
        together: rates of a training worker.
        sharded: SFT's workers divide the model among themselves: each of their passes moves its weights twice, and
            its gradients once.
    """
    parts = cut(sizes.tracked, blocks)
    shards = max(1, machine.influence_workers // len(parts))
    examples = sum(work.volumes) * config.sft.epochs
    again = 4 / 3 if config.resources.gradient_checkpointing else 1
    products = 4 if config.sft.lora else 6  # of each weight with a token: those for its own gradient aren't needed
    multiplied = examples * work.tokens * (products * (sizes.body * again + sizes.head) + 6 * sizes.adapters)
    steps = math.ceil(examples / config.sft.batch_examples)
    update = sizes.trained * UPDATE_BYTES / together.memory
    exchanged = 2 * 4 if machine.sft_workers > 1 else 0
    if sharded:
        passes = math.ceil(config.sft.batch_examples * work.tokens / machine.sft_workers / batch(config))
        exchanged = passes * (2 * WIDTH[config.sft.precision] + 4)
    exchange = exchanged * sizes.trained / together.link
    reference = work.reference * work.tokens
    sample = sum(min(config.influence.examples, volume) for volume in work.volumes) * work.tokens
    solve = max(_solve(config, part, shards, alone) for part in parts)
    if config.influence.joint:
        solve += _forms(config, sizes, work, shards * len(parts), alone)
    return Seconds(
        multiplied / (machine.sft_workers * together.model) + steps * (update + exchange),
        reference * 2 * (sizes.body + sizes.head) / together.model,
        max(_pass(config, sizes, part, sample, reference, alone) for part in parts) / shards,
        solve,
    )


def _pass(config: Config, sizes: Sizes, layers: Layers, sample: float, reference: float, rates: Rates) -> float:
    """Seconds of one actor's pass over so many tokens of domains and of reference sets, if it were the only shard."""
    forward = 2 * (sizes.body + sizes.head)
    backward = 2 * (sizes.body * depth(sizes, layers) / sizes.layers + sizes.head)
    inputs = {input_group(name): columns for name, (_, columns) in layers.items()}
    widths = [rows for rows, _ in layers.values()] + list(inputs.values())
    squares = sum(SYMMETRIC * w * w for w in widths)
    gradients = sum(r * c for r, c in layers.values())
    factors = needs_factors(config.influence.solver, config.influence)
    twice = 2 if factors and config.influence.fisher == "sampled" else 1
    through = sample * (forward + twice * backward) + reference * (forward + backward)
    products = 2 * (sample + reference) * gradients + (2 * sample * squares if factors else 0)
    if config.influence.solver == "ekfac":  # the second pass: rotations, and every example's gradient
        through += sample * (forward + backward)
        products += 2 * sample * (squares + gradients)
    return through / rates.model + products / rates.products


def _solve(config: Config, layers: Layers, shards: int, rates: Rates) -> float:
    """Seconds of the slowest of a layer block's actors in its solve."""

    def of_actor(names: list[str]) -> float:
        shapes = [layers[name] for name in names]
        sets = 2 * len(config.domains)
        products = sum(2 * 2 * units(config) * sets * r * c for r, c in shapes)
        if config.influence.solver not in FACTORED:
            return products / rates.products
        inputs = {input_group(name): layers[name][1] for name in names}
        cubes = sum(r**3 for r, _ in shapes) + sum(c**3 for c in inputs.values())
        products += sum(sets * 4 * r * c * (r + c) for r, c in shapes)
        eigen = config.influence.solver == "ekfac"
        decomposed = EIGEN * cubes / rates.eigen if eigen else INVERSE * cubes / rates.inverse
        return decomposed + products / rates.products

    return max(of_actor(names) for names in by_cost(list(layers), layers, shards))


def _forms(config: Config, sizes: Sizes, work: Work, actors: int, rates: Rates) -> float:
    """Seconds of forward passes over the curvature's examples with every set's tangent, twice the work of a pass."""
    sets = 2 * len(config.domains)
    passes = 2 * sets + math.ceil(sets / at_once(sizes.parameters, sizes.tracked_weights))
    return _curvature_tokens(config, work) / actors * passes * 2 * (sizes.body + sizes.head) / rates.model


def _curvature_tokens(config: Config, work: Work) -> int:
    settings = config.influence
    each = -(-settings.curvature_examples // len(work.volumes))
    examples = sum(min(each, settings.examples, volume) for volume in work.volumes)
    return examples * work.tokens


def calibrate(config: Config, shapes: PretrainedConfig, threads: int) -> Rates:
    """Rates of a worker with so many threads on this machine, in about two seconds.

    The model's is that of one of its layers, forward and backward, on as many tokens as take about a second.
    """
    where, before = models.device(), torch.get_num_threads()
    one = copy.deepcopy(shapes)
    one.update({"num_hidden_layers": 1, "vocab_size": 512, "pad_token_id": 0})
    if getattr(one, "layer_types", None):
        one.update({"layer_types": one.layer_types[:1]})
    torch.set_num_threads(threads)
    try:
        layer = AutoModelForCausalLM.from_config(one, dtype=models.DTYPES[config.sft.precision]).to(where)  # type: ignore[no-untyped-call]
        elements = sum(p.numel() for p in layer.parameters())
        tokens = min(batch(config), 512, max(32, int((1e10 if where.type == "cpu" else 1e13) / elements / 6)))
        ids = torch.zeros(1, tokens, dtype=torch.long, device=where)
        square = torch.randn(1024, 1024, device=where)
        factor = (square[:768, :768] @ square[:768, :768].T).double()
        regular = factor + factor.diagonal().mean() * torch.eye(768, dtype=torch.float64, device=where)
        vector = torch.zeros(2**24, device=where)
        return Rates(
            6 * elements * tokens / _timed(lambda: layer(input_ids=ids).logits.float().sum().backward()),
            2 * 1024**3 / _timed(lambda: square @ square),
            EIGEN * 768**3 / _timed(lambda: torch.linalg.eigh(factor)),
            INVERSE * 768**3 / _timed(lambda: torch.cholesky_inverse(torch.linalg.cholesky(regular))),
            8 * 2**24 / _timed(lambda: vector.add_(1)),
            math.inf if where.type == "cpu" else ABSENT_GPU.link,
        )
    finally:
        torch.set_num_threads(before)


def _timed(call: Callable[[], object]) -> float:
    """Seconds of a call: the better of two, after one that counts for nothing."""

    def once() -> float:
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    once()
    return min(once(), once())
