"""A mixture: how many examples of each domain, and which.

Every domain has one seeded order of its pool, whatever the other domains do. A volume takes whole copies of the pool
first and then the first examples of that order: a larger volume holds all of a smaller one, so that two mixtures
differ only where their volumes do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def seeded(seed: int, *names: str) -> np.random.Generator:
    """A random generator of its own for each (seed, names)."""
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def draw(pool: int, volume: int, seed: int, domain: str) -> npt.NDArray[np.int64]:
    """[volume] indices into a domain's pool of `pool` unique examples."""
    order = seeded(seed, "draw", domain).permutation(pool)
    copies, rest = divmod(volume, pool)
    return np.concatenate([np.tile(order, copies), order[:rest]]).astype(np.int64)


def round_volumes(volumes: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to ``total``, by largest remainder (ties: the earlier domain)."""
    down = [int(np.floor(v + 1e-9)) for v in volumes]
    remainders = [v - d for v, d in zip(volumes, down, strict=True)]
    missing = total - sum(down)
    if not 0 <= missing <= len(down):
        raise ValueError(f"volumes sum to {sum(volumes)}, not {total}")
    for j in sorted(range(len(down)), key=lambda j: (-remainders[j], j))[:missing]:
        down[j] += 1
    return down


def data_order(entries: int, epochs: float, seed: int) -> npt.NDArray[np.int64]:
    """[round(entries · epochs)] positions in the mixture, a new seeded permutation for every epoch."""
    wanted = max(1, round(entries * epochs))
    epochs_needed = -(-wanted // entries)
    order = np.concatenate([seeded(seed, "epoch", str(e)).permutation(entries) for e in range(epochs_needed)])
    return order[:wanted].astype(np.int64)
