"""What a stage spends, in one unit for all: token passes.

An input token that goes forward through a model is one pass, and going backward takes two more, so that a token that is
trained on is 3; forward with K tangents is 1 + K. Padding isn't counted, and neither is what is computed again to save
memory (checkpointed activations, layer blocks, directions that don't fit at once): a stage costs the same wherever it
ran. Every stage that passes tokens through a model says so under ``PASSES`` in its result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from ideal.config.config import InfluenceConfig

if TYPE_CHECKING:  # they load torch
    from ideal.data.batches import Item
    from ideal.influence.accumulate import Block

PASSES: Final = "passes"
FORWARD, BACKWARD = 1, 2
TRAINING = FORWARD + BACKWARD


def input_tokens(items: Iterable[Item]) -> int:
    """Of examples, without padding."""
    from ideal.data.batches import length

    return sum(length(item) for item in items)


def with_tangents(count: int) -> int:
    """Of a token that goes forward with so many tangents."""
    return FORWARD + count


def of_influence(blocks: Sequence[Block], domains: int, settings: InfluenceConfig) -> int:
    """Token passes of a run's influence table.

    Every block's gradient takes a training's; labels that are drawn for the factors take a second way back through the
    domains' blocks, `ekfac` a second pass over them. ``joint`` sees its curvature examples with a tangent for every
    set.

    Args:
        blocks: the sample's.
        domains: how many of its sets are domains.
    """
    from ideal.influence.sampled import curvature_blocks
    from ideal.influence.solvers import needs_factors

    everything, mixture = _tokens(blocks), _tokens([block for block in blocks if block.weight > 0])
    found = TRAINING * everything
    if needs_factors(settings.solver, settings) and settings.fisher == "sampled":
        found += BACKWARD * mixture
    if settings.solver == "ekfac":
        found += TRAINING * mixture
    if settings.joint:
        sets = len(blocks) // settings.blocks
        found += with_tangents(sets) * _tokens(curvature_blocks(blocks, domains, settings))
    return found


def _tokens(blocks: Sequence[Block]) -> int:
    return sum(input_tokens(block.items) for block in blocks)
