"""A random mixture: what a method must beat to have known anything. Each seed draws another."""

from __future__ import annotations

from ideal.methods.problem import Problem, Stages


def choose(problem: Problem, stages: Stages) -> dict[str, int]:
    """One draw from a Dirichlet distribution around D0."""
    return problem.mixture(problem.around(1, "random")[0])
