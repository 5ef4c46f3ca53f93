"""Micro-batches: examples of like length together, up to a budget of tokens.

Inputs end at the last position that predicts a supervised token: nothing behind it carries a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

IGNORED = -100
"""Target of a position that isn't supervised."""

Item = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]
"""An example: its token ids and which of them are supervised, [length] each."""


@dataclass(frozen=True)
class Batch:
    """n examples, right-padded to length L.

    Attributes:
        ids: [n, L] input token ids.
        mask: [n, L] true where there is a token, false where there is padding.
        targets: [n, L] the next token where it is supervised, else ``IGNORED``.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor

    @property
    def tokens(self) -> int:
        """Input tokens without padding."""
        return int(self.mask.sum())

    def to(self, device: torch.device) -> Batch:
        return Batch(self.ids.to(device), self.mask.to(device), self.targets.to(device))


def length(item: Item) -> int:
    """Input tokens of an example: up to the last position that predicts a supervised token."""
    return int(np.flatnonzero(item[1])[-1])


def collate(items: Sequence[Item]) -> Batch:
    """Examples of (ids, supervised) as one batch."""
    lengths = [length(item) for item in items]
    shape = (len(items), max(lengths))
    ids = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    targets = torch.full(shape, IGNORED, dtype=torch.long)
    for row, ((tokens, supervised), n) in enumerate(zip(items, lengths, strict=True)):
        following = torch.from_numpy(tokens[1 : n + 1].astype(np.int64))
        ids[row, :n] = torch.from_numpy(tokens[:n].astype(np.int64))
        mask[row, :n] = True
        targets[row, :n] = following.where(torch.from_numpy(supervised[1 : n + 1].copy()), torch.tensor(IGNORED))
    return Batch(ids, mask, targets)


def by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Groups of indices, like lengths together, whose padded size is at most ``budget`` tokens.

    An example longer than the budget gets a group of its own.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def batches(items: Sequence[Item], budget: int) -> list[tuple[list[int], Batch]]:
    """Examples as micro-batches, each with the positions in ``items`` of its rows."""
    groups = by_length([length(item) for item in items], budget)
    return [(group, collate([items[i] for i in group])) for group in groups]
