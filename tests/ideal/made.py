"""Small sets of random examples, and a tiny model in fp64, for tests of the mathematics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ideal.config.config import InfluenceConfig
from ideal.data.batches import Item
from ideal.data.examples import ExampleSet
from ideal.influence.accumulate import BlockGradient, FactorSums, accumulate
from ideal.influence.in_process import influence_tables
from ideal.influence.sampled import Sampled
from ideal.influence.table import InfluenceTable, split

VOCABULARY = 12
MLP = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"]
"""Layers that tests track: one of a shared input, one behind it, one further up."""


def example_set(n: int, seed: int, vocabulary: int = VOCABULARY, longest: int = 6) -> ExampleSet:
    """Examples with prompts and answers of 1 to ``longest`` tokens, some with a second turn and a tail."""
    random = np.random.default_rng(seed)
    ids, supervised, offsets = [], [], [0]
    for _ in range(n):
        spans = random.integers(1, longest + 1, 4) if random.random() < 0.5 else random.integers(1, longest + 1, 2)
        mask = [turn % 2 == 1 for turn, span in enumerate(spans) for _ in range(span)] + [False] * random.integers(0, 3)
        ids += random.integers(0, vocabulary, len(mask)).tolist()
        supervised += mask
        offsets.append(len(ids))
    return ExampleSet(np.array(ids, np.int32), np.array(supervised), np.array(offsets, np.int64))


def llama(seed: int = 0, vocabulary: int = VOCABULARY, hidden: int = 8) -> LlamaForCausalLM:
    """Two layers in fp64, in evaluation mode."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).double().eval()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):  # it computes in fp32, whatever it is given
                setattr(module, name, torch.nn.RMSNorm(hidden, config.rms_norm_eps, dtype=torch.float64))
    return model


def run(
    model: torch.nn.Module,
    blocks: Sequence[object],
    *,
    layers: Sequence[str] = MLP,
    fisher: str = "sampled",
    factors: bool = True,
    seed: int = 0,
    batch_tokens: int = 64,
) -> tuple[FactorSums, list[BlockGradient]]:
    """``accumulate`` with its blocks' gradients in a list."""
    found: list[BlockGradient] = []
    keep: Callable[..., None] = lambda block, gradient: found.append(gradient)  # noqa: E731
    sums = accumulate(
        model,
        list(layers),
        blocks,  # type: ignore[arg-type]
        fisher=fisher,
        factors=factors,
        seed=seed,
        batch_tokens=batch_tokens,
        device=torch.device("cpu"),
        done=keep,
    )
    return sums, found


def influence(
    model: torch.nn.Module,
    domains: Sequence[ExampleSet],
    references: Sequence[ExampleSet],
    weights: Sequence[float],
    *,
    solver: str,
    blocks: int = 2,
    damping: float = 0.1,
    layers: Sequence[str] = MLP,
    fisher: str = "sampled",
    schedule: dict[str, torch.Tensor] | None = None,
    own: dict[str, torch.Tensor] | None = None,
    joint: bool = False,
    batch_tokens: int = 64,
) -> InfluenceTable:
    """The whole influence, as the service computes it, in one process.

    Args:
        schedule: an optimiser's Λ, which the solver damps with.
        own: the same, which only ``joint`` knows.
    """
    parts = []
    for number, (domain, weight) in enumerate(zip(domains, weights, strict=True)):
        parts += split(f"train/{number}", domain, list(range(len(domain))), blocks, weight)
    for number, reference in enumerate(references):
        parts += split(f"reference/{number}", reference, list(range(len(reference))), blocks, 0.0)
    settings = InfluenceConfig.model_validate(
        {"solver": solver, "blocks": blocks, "examples": blocks, "precision": "fp32", "products": 400, "residual": 1e-9}
        | {"damping": "schedule" if schedule else damping, "curvature_examples": 10**6, "fisher": fisher}
        | {"joint": joint}
    )
    sample = Sampled(parts, len(domains), settings, schedule or own or {}, 0, batch_tokens, torch.device("cpu"))
    return influence_tables(model, list(layers), sample, [solver])[solver]


def full_loss(model: torch.nn.Module, examples: Iterable[Item]) -> tuple[torch.Tensor, int]:
    """Summed loss and supervised tokens, one example at a time, through the whole model: the plain definition."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, supervised in examples:
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1].double()
        targets = torch.from_numpy(ids[1:].astype(np.int64)).where(torch.from_numpy(supervised[1:].copy()), -100)
        total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        count += int(supervised[1:].sum())
    return total, count
