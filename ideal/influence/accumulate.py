"""One pass over the sample: every layer's factors, and every block's gradient, at once.

A *block* is a part of one set (a domain's training sample or a reference set). For each micro-batch one forward pass
serves two backward passes: one with labels drawn from the model for S (the Fisher's), one with the data's labels for
the gradient. Sums are fp32, counts are kept beside them, and a division happens once, at the end.

The curvature is that of the *mixture's* mean loss per supervised token. A domain with weight w_j, of which the sample
has t_j supervised tokens, enters both factors with w_j/t_j; so one accumulator serves any number of domains.

A [d, d] factor takes d² multiplications a position, which for wide layers is more than the model itself takes. It is
symmetric, so that little more than half of it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ideal.data.batches import IGNORED, Batch, Item, batches
from ideal.influence.layers import Recorder, input_group, record
from ideal.mixture import seeded
from ideal.model.base import summed_loss, supervised_logits, wide


@dataclass(frozen=True)
class Block:
    """A part of a set.

    Attributes:
        set: the set's name; examples of one name in one place have one sampled label each.
        items: its examples.
        keys: what seeds each example's sampled labels.
        weight: w_j/t_j of a domain; 0 for a reference set, which has no part in the curvature.
    """

    set: str
    number: int
    items: Sequence[Item]
    keys: Sequence[int]
    weight: float

    def supervised(self) -> int:
        """Supervised tokens in it."""
        return sum(int(supervised[1:].sum()) for _, supervised in self.items)


class FactorSums:
    """Weighted sums of a aᵀ and g gᵀ over positions, for every tracked layer.

    Attributes:
        a: [d_in, d_in] by input group.
        s: [d_out, d_out] by layer.
        positions: Σ weight · positions. As Σ weight · supervised tokens is 1 once all blocks are in, that is the
            number of positions per supervised token; a and s divided by it are the means A and S.
    """

    def __init__(self) -> None:
        self.a: dict[str, torch.Tensor] = {}
        self.s: dict[str, torch.Tensor] = {}
        self.positions = 0.0

    def add_inputs(self, group: str, rows: torch.Tensor, weight: float) -> None:
        _add_square(self.a, group, rows, weight)

    def add_gradients(self, layer: str, rows: torch.Tensor, weight: float) -> None:
        _add_square(self.s, layer, rows, weight)

    def mirror(self) -> None:
        """Fill in what lies below the strips, once all rows are in."""
        for factor in (*self.a.values(), *self.s.values()):
            for start, end in _strips(len(factor)):
                factor[end:, start:end] = factor[start:end, end:].T


@dataclass(frozen=True)
class BlockGradient:
    """A block's gradient: the *sum* over its supervised tokens.

    Attributes:
        gradients: [d_out, d_in] fp32 by layer.
        tokens: supervised tokens.
        loss: summed loss, nats.
    """

    gradients: dict[str, torch.Tensor]
    tokens: int
    loss: float


STRIPS = 4
"""A wide factor's rows are computed in so many strips, each from its own diagonal on: 5/8 of the work."""
WIDE = 512
"""Columns from which strips pay."""

DRAWN_AT_ONCE = 64
"""Positions whose labels are drawn at a time: distributions in fp64 are larger than the logits."""


def accumulate(
    model: nn.Module,
    layers: list[str],
    blocks: Sequence[Block],
    *,
    fisher: str,
    factors: bool,
    seed: int,
    batch_tokens: int,
    device: torch.device,
    done: Callable[[Block, BlockGradient], None],
) -> FactorSums:
    """Pass over the blocks.

    Args:
        layers: tracked layers, as ``tracked_layers`` names them.
        fisher: `sampled` or `empirical`.
        factors: False skips the curvature (solver `identity`).
        seed: of the sampled labels; each example has a generator of its own, so that neither batching nor sharding
            changes them.
        done: called with each block's gradient when it is complete; it is not kept here.
    """
    sums = FactorSums()
    with record(model, layers) as recorder:
        for block in blocks:
            gradients: dict[str, torch.Tensor] = {}
            tokens, loss_sum = 0, 0.0
            for members, batch in batches(block.items, batch_tokens):
                moved = batch.to(device)
                logits = supervised_logits(model, moved)
                outputs = dict(recorder.outputs)  # gradient checkpointing records others while it recomputes
                loss = summed_loss(logits, moved)
                curved = factors and block.weight > 0
                if curved and fisher == "sampled":
                    drawn_loss = sampled_loss(logits, moved, block, members, seed)
                    curvature = output_gradients_of(outputs, layers, drawn_loss, keep=True)
                    _add_factors(sums, recorder, curvature, block.weight, moved)
                output_gradients = output_gradients_of(outputs, layers, loss, keep=False)
                if curved and fisher == "empirical":
                    _add_factors(sums, recorder, output_gradients, block.weight, moved)
                for layer in layers:
                    g = wide(output_gradients[layer][moved.mask])
                    a = wide(recorder.inputs[input_group(layer)][moved.mask])
                    if layer in gradients:
                        gradients[layer].addmm_(g.T, a)
                    else:
                        gradients[layer] = g.T @ a
                tokens += int((moved.targets != IGNORED).sum())
                loss_sum += float(loss.detach())
            done(block, BlockGradient(gradients, tokens, loss_sum))
    sums.mirror()
    return sums


def sampled_loss(logits: torch.Tensor, batch: Batch, block: Block, members: Sequence[int], seed: int) -> torch.Tensor:
    """Summed loss of labels that the model itself draws: its gradient is the Fisher's."""
    keys = [block.keys[i] for i in members]
    drawn = sample_labels(logits.detach(), batch, keys, block.set, seed)
    return nn.functional.cross_entropy(logits, drawn, reduction="sum")


def sample_labels(logits: torch.Tensor, batch: Batch, keys: Sequence[int], set_name: str, seed: int) -> torch.Tensor:
    """[s] labels drawn from the model's own distribution, by each example's own uniform numbers."""
    counts = (batch.targets != IGNORED).sum(1).tolist()
    uniform = torch.cat(
        [
            torch.from_numpy(seeded(seed, "labels", set_name, str(key)).random(count))
            for key, count in zip(keys, counts, strict=True)
        ]
    ).to(logits.device)
    parts = zip(torch.split(logits, DRAWN_AT_ONCE), torch.split(uniform, DRAWN_AT_ONCE), strict=True)
    return torch.cat([_drawn(*part) for part in parts]).clamp(max=logits.shape[-1] - 1)


def _drawn(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    return torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None]).squeeze(1)


def output_gradients_of(
    outputs: dict[str, torch.Tensor], layers: list[str], loss: torch.Tensor, keep: bool
) -> dict[str, torch.Tensor]:
    """[n, L, d_out] by layer."""
    gradients = torch.autograd.grad(loss, [outputs[layer] for layer in layers], retain_graph=keep)
    return dict(zip(layers, gradients, strict=True))


def _add_factors(
    sums: FactorSums,
    recorder: Recorder,
    output_gradients: dict[str, torch.Tensor],
    weight: float,
    batch: Batch,
) -> None:
    """Every non-padding position counts, prompts included: the answer's loss reaches them through attention."""
    for group in {input_group(layer): None for layer in output_gradients}:
        sums.add_inputs(group, wide(recorder.inputs[group][batch.mask]), weight)
    for layer, g in output_gradients.items():
        sums.add_gradients(layer, wide(g[batch.mask]), weight)
    sums.positions += weight * batch.tokens


def _add_square(store: dict[str, torch.Tensor], key: str, rows: torch.Tensor, weight: float) -> None:
    width = rows.shape[1]
    if key not in store:
        store[key] = torch.zeros(width, width, device=rows.device, dtype=rows.dtype)
    for start, end in _strips(width):
        store[key][start:end, start:].addmm_(rows[:, start:end].T, rows[:, start:], alpha=weight)


def _strips(width: int) -> list[tuple[int, int]]:
    step = -(-width // STRIPS) if width >= WIDE else width
    return [(start, min(start + step, width)) for start in range(0, width, step)]
