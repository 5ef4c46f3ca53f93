"""Specific SFT: one domain alone, for as many examples as all of D0: what the others cost it, and it them."""

from __future__ import annotations

from ideal.methods.problem import Problem, Stages


def choose(problem: Problem, stages: Stages) -> dict[str, int]:
    """All of the total from ``methods.domain``, however many copies that takes."""
    return only(problem, str(problem.config.methods.domain))


def only(problem: Problem, domain: str) -> dict[str, int]:
    """A mixture of one domain."""
    return {name: problem.total if name == domain else 0 for name in problem.volumes}
