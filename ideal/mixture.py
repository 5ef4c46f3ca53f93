"""A mixture: how many examples of each domain, and which.

Every domain has one seeded order of its pool, whatever the other domains do. A volume takes whole copies of the pool
first and then the first examples of that order: a larger volume holds all of a smaller one, so that two mixtures
differ only where their volumes do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

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
    chosen: npt.NDArray[np.int64] = np.concatenate([np.tile(order, copies), order[:rest]]).astype(np.int64)
    return chosen


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


def data_order(volumes: Mapping[str, int], epochs: float, seed: int) -> npt.NDArray[np.int64]:
    """[round(V · epochs)] positions in the mixture (its domains' draws one after another), shuffled anew every epoch.

    Every draw has a seeded place of its own between 0 and 1, whatever the other domains do: a changed volume adds or
    takes away examples and leaves the order of the rest, so that two runs differ by their mixtures and not by luck.
    """
    total = sum(volumes.values())
    wanted = max(1, round(total * epochs))
    orders = []
    for epoch in range(-(-wanted // total)):
        places = [seeded(seed, "order", str(epoch), d).random(v) for d, v in volumes.items()]
        orders.append(np.argsort(np.concatenate(places), kind="stable"))
    return np.concatenate(orders)[:wanted].astype(np.int64)
