"""What an influence is computed from: every set's blocks, as every worker reads them for itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ideal.config.config import InfluenceConfig
from ideal.data.examples import ExampleSet
from ideal.equilibrium import token_weights
from ideal.influence.accumulate import Block
from ideal.influence.table import split
from ideal.mixture import draw
from service.store.layout import reference_file, train_file


@dataclass(frozen=True)
class Sample:
    """What an influence is computed from; small, so that every actor reads the examples for itself."""

    data: Path
    volumes: dict[str, int]
    config: InfluenceConfig
    seed: int

    def blocks(self) -> list[Block]:
        """Every domain's blocks, then every reference set's.

        A domain's sample (``sample``: `first`) is the beginning of its seeded order, no more of it than the mixture
        holds, or (`next`) what follows in that order upon the mixture's: the examples that a larger volume would add,
        none of which it has learned. Only where there are fewer than blocks, others of the pool fill them up.
        """
        pools = {domain: ExampleSet.load(train_file(self.data, domain)) for domain in self.volumes}
        lengths = [float(pool.supervised_tokens().mean()) for pool in pools.values()]
        weights = token_weights(list(self.volumes.values()), lengths)
        blocks: list[Block] = []
        for (domain, pool), weight in zip(pools.items(), weights, strict=True):
            order = draw(len(pool), len(pool), self.seed, domain)
            held = min(self.volumes[domain], len(pool))
            fitting, rest = (order[:held], order[held:])
            if self.config.sample == "next":
                fitting, rest = rest, fitting
            sample = np.concatenate([fitting, rest[: max(0, self.config.blocks - len(fitting))]])
            chosen = sample[: self.config.examples].tolist()
            blocks += split(f"train/{domain}", pool, chosen, self.config.blocks, float(weight))
        for domain in self.volumes:
            reference = ExampleSet.load(reference_file(self.data, domain))
            everything = list(range(len(reference)))
            blocks += split(f"reference/{domain}", reference, everything, self.config.blocks, 0.0)
        return blocks
