"""Joint SFT: all data as it is. The baseline that the paper measures against."""

from __future__ import annotations

from ideal.methods.problem import Problem, Stages


def choose(problem: Problem, stages: Stages) -> dict[str, int]:
    """D0."""
    return dict(problem.volumes)
