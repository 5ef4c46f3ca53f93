"""The mixtures that need no measurement: what any method must be better than to have known something."""

from __future__ import annotations

import numpy as np

from ideal.methods.problem import Problem, Stages


def base(problem: Problem, stages: Stages) -> dict[str, int]:
    """No examples: θ₀ itself. Where this is as good as Joint SFT, no mixture could show its worth."""
    return dict.fromkeys(problem.volumes, 0)


def joint(problem: Problem, stages: Stages) -> dict[str, int]:
    """D0, all data as it is: the baseline that the paper measures against."""
    return dict(problem.volumes)


def uniform(problem: Problem, stages: Stages) -> dict[str, int]:
    """The same number of examples of every domain, as far as ``max_copies`` of a pool allow."""
    return problem.mixture(np.ones(len(problem.volumes)))


def random(problem: Problem, stages: Stages) -> dict[str, int]:
    """One draw from a Dirichlet distribution around D0; each seed draws another."""
    return problem.mixture(problem.around(1, "random")[0])


def specific(problem: Problem, stages: Stages) -> dict[str, int]:
    """All of the total from ``methods.domain``, however many copies that takes."""
    return only(problem, str(problem.config.methods.domain))


def only(problem: Problem, domain: str) -> dict[str, int]:
    """A mixture of one domain."""
    return {name: problem.total if name == domain else 0 for name in problem.volumes}
