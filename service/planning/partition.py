"""How an influence's layers are divided: in blocks that each pass over the data, and among the workers that solve."""

from __future__ import annotations

import numpy as np

from ideal.influence.layers import input_group

Layers = dict[str, tuple[int, int]]
"""[d_out, d_in] by name."""


def cut(layers: Layers, blocks: int) -> list[Layers]:
    """The layers in so many blocks, as the influence stage cuts them."""
    parts = np.array_split(np.array(list(layers)), min(blocks, len(layers)))
    return [{str(name): layers[str(name)] for name in part} for part in parts]


def by_cost(layers: list[str], shapes: Layers, workers: int) -> list[list[str]]:
    """Layers for each worker, nearly equal in d³; layers that share an input stay together."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(input_group(layer), []).append(layer)
    cost = {g: sum(shapes[x][0] ** 3 for x in xs) + shapes[xs[0]][1] ** 3 for g, xs in groups.items()}
    parts: list[list[str]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for group in sorted(groups, key=lambda g: -cost[g]):
        lightest = loads.index(min(loads))
        parts[lightest] += groups[group]
        loads[lightest] += cost[group]
    return parts
