"""Equal volumes of all domains but one, whichever is missed least: an SFT for each domain, and no model of anything."""

from __future__ import annotations

import numpy as np

from ideal.methods.problem import Problem, Stages
from ideal.mixture import round_volumes


def choose(problem: Problem, stages: Stages) -> dict[str, int]:
    """Of those mixtures, the one that leaves the lowest reference loss."""
    tried = [without(problem, domain) for domain in problem.volumes]
    losses = [problem.objective(stages.losses(stages.trained(mixture))) for mixture in tried]
    return tried[int(np.argmin(losses))]


def without(problem: Problem, domain: str) -> dict[str, int]:
    """The whole total, equally from all other domains, however many copies that takes."""
    others = [name for name in problem.volumes if name != domain]
    equal = round_volumes([problem.total / len(others)] * len(others), problem.total)
    volumes = dict(zip(others, equal, strict=True))
    return {name: volumes.get(name, 0) for name in problem.volumes}
