"""The influence of every domain on every reference set, with intervals.

    a_jr = g_rᵀ (H + λ)⁻¹ ḡ_j        ḡ_j, g_r: mean gradients per supervised token; H: the mixture's curvature

Positive: training more on domain j lowers the loss on reference set r. It is summed over tracked layers.

Every set is split into B blocks whose gradients are kept as sums with their token counts. All that leaves a layer is
the table of products between blocks, ⟨G_rc, (H + λ)⁻¹ G_jb⟩: the influence, its value on any part of the sets, and
its bootstrap over blocks are sums over that small table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from ideal.data.examples import ExampleSet
from ideal.mixture import seeded

if TYPE_CHECKING:
    from ideal.influence.accumulate import Block

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class InfluenceTable:
    """Products between blocks; M domains, R reference sets, B blocks each, L layers.

    Attributes:
        products: [L, M, B, R, B] ⟨G_rc, (H + λ)⁻¹ G_jb⟩ of gradient sums.
        domain_tokens: [M, B] supervised tokens of each domain block.
        reference_tokens: [R, B] the same of each reference block.
        reference_loss: [R] mean loss per supervised token, nats.
        crowding: [M, R] δ_jr: how much more than the mixture's mean token one of domain j takes from what all domains
            do for set r, by raising AdamW's denominator (``ideal.equilibrium``).
    """

    products: Array
    domain_tokens: Array
    reference_tokens: Array
    reference_loss: Array
    crowding: Array

    def matrix(self) -> Array:
        """[M, R] a_jr."""
        return np.asarray(self.by_layer().sum(0))

    def by_layer(self) -> Array:
        """[L, M, R] each layer's part of a_jr."""
        counts = np.outer(self.domain_tokens.sum(1), self.reference_tokens.sum(1))
        return np.asarray(self.products.sum((2, 4)) / counts)

    def resampled(self, resamples: int, seed: int, widening: float = 1.0) -> Array:
        """[S, M, R] a_jr as other samples might have given it: a bootstrap over every set's blocks.

        B blocks drawn with replacement are too sure of themselves: the variance of a mean comes out (B − 1)/B too
        small, and it is known with B − 1 degrees of freedom only. So each resample's distance from the influence is
        multiplied by √(B/(B − 1)) and by one draw of √(ν/χ²_ν), ν = B − 1, which gives the cloud Student's tails:
        its quantiles are intervals, and its shares of one sign probabilities, that hold what they say.

        Args:
            widening: of every resample's distance from the influence, beside that.
        """
        products = self.products.sum(0)
        m, b, r, _ = products.shape
        random = seeded(seed, "bootstrap")
        domain = random.multinomial(b, np.full(b, 1 / b), size=(resamples, m)).astype(float)
        reference = random.multinomial(b, np.full(b, 1 / b), size=(resamples, r)).astype(float)
        total = np.einsum("smb,mbrc,src->smr", domain, products, reference, optimize=True)
        tokens = np.einsum("smb,mb->sm", domain, self.domain_tokens)
        reference_tokens = np.einsum("src,rc->sr", reference, self.reference_tokens)
        found = total / tokens[:, :, None] / reference_tokens[:, None, :]
        tails = np.sqrt(b / random.chisquare(b - 1, size=(resamples, 1, 1)))
        return np.asarray(self.matrix() + widening * tails * (found - self.matrix()))

    def objective(self, matrix: Array, kind: str) -> Array:
        """[..., M] a_j on the objective: the mean over reference sets (`macro`) or over their tokens (`micro`)."""
        tokens = self.reference_tokens.sum(1)
        weights = tokens / tokens.sum() if kind == "micro" else np.full(len(tokens), 1 / len(tokens))
        return np.asarray(matrix @ weights)

    def objective_loss(self, kind: str) -> float:
        """The loss that is minimised, nats per token."""
        return float(self.objective(self.reference_loss[None, :], kind)[0])

    def save(self, path: Path) -> None:
        save_file(
            {name: np.ascontiguousarray(value) for name, value in vars(self).items()},
            path,
        )

    @classmethod
    def load(cls, path: Path) -> InfluenceTable:
        return cls(**load_file(path))


def split(name: str, examples: ExampleSet, indices: Sequence[int], blocks: int, weight: float) -> list[Block]:
    """A set's sample in B blocks of nearly equal numbers of examples.

    Args:
        indices: the sample; neighbours go to different blocks.
        weight: w_j of a domain, its share of the mixture's supervised tokens; 0 for a reference set.
    """
    from ideal.influence.accumulate import Block  # which loads torch; a table alone is read without

    items = [examples[int(i)] for i in indices]
    tokens = sum(int(supervised[1:].sum()) for _, supervised in items)
    return [
        Block(name, b, items[b::blocks], [int(i) for i in indices[b::blocks]], weight / tokens) for b in range(blocks)
    ]


def shard(blocks: Sequence[Block], shards: int) -> list[list[int]]:
    """Blocks (by position) for each shard, nearly equal in tokens; the largest first, to the emptiest shard."""
    from ideal.data.batches import length

    sizes = [sum(length(item) for item in block.items) for block in blocks]
    parts: list[list[int]] = [[] for _ in range(shards)]
    loads = [0] * shards
    for index in sorted(range(len(blocks)), key=lambda i: (-sizes[i], i)):
        lightest = loads.index(min(loads))
        parts[lightest].append(index)
        loads[lightest] += sizes[index]
    return [sorted(part) for part in parts]
