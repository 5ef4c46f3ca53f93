"""What an influence is computed from: every set's blocks, as every worker reads them for itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ideal.config import InfluenceConfig
from ideal.curvature.accumulate import Block
from ideal.equilibrium import token_weights
from ideal.examples import ExampleSet
from ideal.influence import split
from ideal.mixture import draw
from service.files import reference_file, train_file


@dataclass(frozen=True)
class Sample:
    """What an influence is computed from; small, so that every actor reads the examples for itself."""

    data: Path
    volumes: dict[str, int]
    config: InfluenceConfig
    seed: int

    def blocks(self) -> list[Block]:
        """Every domain's blocks, then every reference set's.

        A domain's sample is the beginning of its seeded order, which the mixture holds, or (``sample: next``) what
        follows in that order upon the mixture's: the examples that a larger volume would add.
        """
        pools = {domain: ExampleSet.load(train_file(self.data, domain)) for domain in self.volumes}
        lengths = [float(pool.supervised_tokens().mean()) for pool in pools.values()]
        weights = token_weights(list(self.volumes.values()), lengths)
        blocks: list[Block] = []
        for (domain, pool), weight in zip(pools.items(), weights, strict=True):
            start = self.volumes[domain] if self.config.sample == "next" else 0
            end = start + min(self.config.examples, len(pool))
            sample = draw(len(pool), end, self.seed, domain)[start:].tolist()
            blocks += split(f"train/{domain}", pool, sample, self.config.blocks, float(weight))
        for domain in self.volumes:
            reference = ExampleSet.load(reference_file(self.data, domain))
            everything = list(range(len(reference)))
            blocks += split(f"reference/{domain}", reference, everything, self.config.blocks, 0.0)
        return blocks
