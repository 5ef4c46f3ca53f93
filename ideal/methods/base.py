"""θ₀ itself: the model before any fine-tuning. Where this is as good as Joint SFT, no mixture could show its worth."""

from __future__ import annotations

from ideal.methods.problem import Problem, Stages


def choose(problem: Problem, stages: Stages) -> dict[str, int]:
    """No examples of any domain."""
    return dict.fromkeys(problem.volumes, 0)
