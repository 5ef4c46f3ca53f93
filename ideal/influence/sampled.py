"""A sample of all sets in blocks, and how much of it the curvature takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch

from ideal.config.config import InfluenceConfig
from ideal.influence.accumulate import Block
from ideal.influence.table import Array


@dataclass(frozen=True)
class Sampled:
    """A sample's blocks and what is asked of them.

    Attributes:
        blocks: every domain's B blocks, one domain after another, then every reference set's.
        domains: how many domains; there are as many reference sets as the other blocks make.
        damping: Λ by weight, as the SFT saved it; needed by `adam`, ``joint`` and ``damping: schedule``.
    """

    blocks: Sequence[Block]
    domains: int
    settings: InfluenceConfig
    damping: Mapping[str, torch.Tensor]
    seed: int
    batch_tokens: int
    device: torch.device


def tokens_and_weights(blocks: Sequence[Block], domains: int, each: int) -> tuple[Array, list[float]]:
    """[sets, B] supervised tokens of every block, and [M] w_j, each domain's share of the mixture's.

    Args:
        blocks: of all sets, as ``Sampled`` holds them.
        each: B.
    """
    tokens = np.array([block.supervised() for block in blocks], float).reshape(-1, each)
    rates = np.array([block.weight for block in blocks]).reshape(-1, each)
    return tokens, (tokens * rates)[:domains].sum(1).tolist()


def curvature_blocks(blocks: Sequence[Block], domains: int, settings: InfluenceConfig, parts: int = 1) -> list[Block]:
    """Equally many examples of each domain, from all of its blocks in turn, with weights that sum to the domain's.

    Args:
        parts: blocks to deal a domain's examples to; as few as there is work to divide, since batches are made of one.
    """
    taken: list[Block] = []
    each = -(-settings.curvature_examples // domains)
    for j in range(domains):
        own = blocks[j * settings.blocks : (j + 1) * settings.blocks]
        rows = zip_longest(*(zip(block.items, block.keys, strict=True) for block in own))
        items, keys = zip(*[pair for row in rows for pair in row if pair][:each], strict=True)
        dealt = [Block(own[0].set, n, items[n::parts], keys[n::parts], 1.0) for n in range(min(parts, len(items)))]
        tokens = sum(block.supervised() for block in dealt)
        weight = own[0].weight * sum(block.supervised() for block in own) / tokens
        taken += [replace(block, weight=weight) for block in dealt]
    return taken
