"""The influence stage as a multiple of a plain forward and backward pass over the same tokens, in one process.

    python -m tests.benchmarks.influence jobs/configs/quickstart.yaml [a.b=c …]

Prints tokens per second of both, and the ratio of the pass (factors and gradients) and of pass and solve together. The
plain pass computes all weights' gradients of the same examples in the same micro-batches, at the same precision.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from ideal.batches import batches, length
from ideal.chat import ChatEncoder
from ideal.config import load
from ideal.curvature.accumulate import BlockGradient, accumulate
from ideal.curvature.kfac import curvature, eigenbasis
from ideal.curvature.layers import input_group, tracked_layers
from ideal.domains import prepare, starting_volumes
from ideal.influence import layer_products
from ideal.model import DTYPES, load_model, load_tokenizer, materialise, summed_loss, supervised_logits
from service.data import reference_file, train_file
from service.sample import Sample


def main(path: str, *overrides: str) -> None:
    config = load(path, list(overrides))
    settings, where = config.influence, torch.device("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        materialise(config.model, folder)
        found = {}
        for domain in prepare(config, ChatEncoder(load_tokenizer(folder), config.model.max_tokens), []):
            domain.train.save(train_file(folder, domain.name))
            domain.reference.save(reference_file(folder, domain.name))
            found[domain.name] = {
                "pool": len(domain.train),
                "reference": len(domain.reference),
                "account": domain.account,
            }
        blocks = Sample(folder, starting_volumes(config, found), settings, config.seed).blocks()
        model = load_model(folder, DTYPES[settings.precision], where)
    tokens = sum(length(item) for block in blocks for item in block.items)
    budget = config.resources.batch_tokens

    def plain() -> None:
        model.requires_grad_(True)
        for block in blocks:
            for _, batch in batches(block.items, budget):
                summed_loss(supervised_logits(model, batch), batch).backward()
                model.zero_grad()

    gradients: list[BlockGradient] = []
    layers = tracked_layers(model, settings.layers)
    plain()
    started = time.perf_counter()
    plain()
    plain_seconds = time.perf_counter() - started
    started = time.perf_counter()
    sums = accumulate(
        model,
        layers,
        blocks,
        fisher=settings.fisher,
        factors=settings.solver == "kfac",
        seed=config.seed,
        batch_tokens=budget,
        device=where,
        done=lambda _, gradient: gradients.append(gradient),
    )
    pass_seconds = time.perf_counter() - started
    half = len(blocks) // 2
    for layer in layers:
        a = eigenbasis(sums.a[input_group(layer)] / sums.positions)
        s = eigenbasis(sums.s[layer] / sums.positions)
        eigen = curvature(a, s, sums.positions, settings.damping, torch.float32)
        layer_products(
            eigen,
            half,
            half,
            lambda side, number, layer=layer: gradients[number + (half if side == "reference" else 0)].gradients[layer],
        )
    both_seconds = time.perf_counter() - started
    print(f"{tokens} tokens, {len(layers)} layers, {len(blocks)} blocks, {torch.get_num_threads()} threads")
    print(f"plain forward and backward   {plain_seconds:7.1f} s  {tokens / plain_seconds:7.0f} tokens/s")
    print(f"factors and gradients        {pass_seconds:7.1f} s  {pass_seconds / plain_seconds:7.2f} × plain")
    print(f"  and the solve              {both_seconds:7.1f} s  {both_seconds / plain_seconds:7.2f} × plain")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["jobs/configs/quickstart.yaml"])
