"""The `code_eval` metric that lm-eval's coding tasks fetch from a hub, with the sandbox in its place.

Those tasks call `evaluate.load("code_eval")` while they are imported and keep what they get. Replacing that
one name during the import puts every program they ever score into `ideal.benchmarks.sandbox`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

from ideal.benchmarks import sandbox

START_SECONDS = 5.0

Details = dict[int, list[tuple[int, dict[str, Any]]]]


class CodeEval:
    """The part of the hub's metric that tasks use."""

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        num_workers: int | None = None,
        timeout: float = 3.0,
    ) -> tuple[dict[str, float], Details]:
        """Run each candidate with its tests.

        Args:
            references: the tests of each problem.
            predictions: the candidates for each problem.
            k: the values of k in pass@k.
            num_workers: programs run at once. Default: as many as there are CPUs.
            timeout: processor time of a program, in seconds.

        Returns:
            The mean of pass@k for each k that no problem has too few candidates for, and for each problem its
            candidates' numbers and outcomes.

        Raises:
            BadInput: this machine can't wall off a process.
        """
        sandbox.require()
        limits = sandbox.Limits(wall_seconds=timeout + START_SECONDS, cpu_seconds=math.ceil(timeout))
        jobs = [
            (task, number, f"{candidate}\n{test}")
            for task, (candidates, test) in enumerate(zip(predictions, references, strict=True))
            for number, candidate in enumerate(candidates)
        ]
        with ThreadPoolExecutor(num_workers or os.cpu_count() or 1) as pool:
            outcomes = list(pool.map(lambda job: sandbox.run(job[2], limits), jobs))
        details: Details = {}
        for (task, number, _), outcome in zip(jobs, outcomes, strict=True):
            result = {"task_id": task, "passed": outcome.passed, "result": outcome.reason}
            details.setdefault(task, []).append((number, {**result, "completion_id": number}))
        counts = [(len(tried), sum(result["passed"] for _, result in tried)) for tried in details.values()]
        scores = {
            f"pass@{size}": sum(_pass_at(size, *count) for count in counts) / len(counts)
            for size in k
            if all(tried >= size for tried, _ in counts)
        }
        return scores, details


def _pass_at(k: int, tried: int, passed: int) -> float:
    """Chance that one of k candidates passes, drawn from those tried without putting any back."""
    return 1.0 - math.comb(tried - passed, k) / math.comb(tried, k)


@contextmanager
def sandboxed() -> Iterator[None]:
    """While it lasts, `evaluate.load("code_eval")` gives `CodeEval`; every other metric is loaded as ever."""
    import evaluate  # takes seconds: with it come transformers' pipelines

    original = evaluate.load

    def load(path: str, *args: Any, **kwargs: Any) -> Any:
        return CodeEval() if path == "code_eval" else original(path, *args, **kwargs)

    with mock.patch.object(evaluate, "load", load):
        yield
