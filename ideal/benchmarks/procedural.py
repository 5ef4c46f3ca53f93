"""A reasoning-gym task as an lm-eval task: its question is the prompt, its own scorer the metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import reasoning_gym
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask, Task
from reasoning_gym.factory import DATASETS

from ideal.benchmarks.scorers import Scorer

METRIC = "score"


def names() -> list[str]:
    """The names of reasoning-gym's tasks."""
    return sorted(DATASETS)


def check(name: str, *, size: int, seed: int, options: Mapping[str, Any]) -> None:
    """Check a task's options; no item is made.

    Raises:
        Exception: an option doesn't exist or doesn't hold; reasoning-gym's own, of any kind.
    """
    reasoning_gym.create_dataset(name, size=size, seed=seed, **options)


def make_task(
    benchmark: str, name: str, *, size: int, seed: int, options: Mapping[str, Any], num_fewshot: int = 0
) -> ConfigurableTask:
    """Make the items and wrap them.

    Args:
        benchmark: the lm-eval task's name.
        name: reasoning-gym's name of the task.
        size: items to score.
        seed: of the items; few-shot examples are the items that follow the last scored one.
        options: reasoning-gym's settings of difficulty.
        num_fewshot: examples in the prompt.
    """
    scorer = Scorer(name, size=size + num_fewshot, seed=seed, options=options)
    rows = [
        {"index": index, "question": entry["question"], "answer": str(entry["answer"])}
        for index, entry in enumerate(scorer.entries)
    ]

    def score(row: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
        return {METRIC: scorer(row["index"], answers[0].strip())}

    splits = {"test": Dataset.from_list(rows[:size])}
    if num_fewshot:
        splits["examples"] = Dataset.from_list(rows[size:])
    task = ConfigurableTask(
        config={
            "task": benchmark,
            "custom_dataset": lambda **_: splits,
            "test_split": "test",
            "fewshot_split": "examples" if num_fewshot else None,
            "num_fewshot": num_fewshot,
            "output_type": "generate_until",
            "doc_to_text": "question",
            "doc_to_target": "answer",
            "process_results": score,
            "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
            "generation_kwargs": {"until": [], "do_sample": False},
        }
    )
    task.scorer = scorer
    return task


def end_scoring(task: Task) -> int:
    """End what scores a task's answers, if it was made here; returns how many answers its scorer failed on."""
    scorer: Scorer | None = getattr(task, "scorer", None)
    if scorer is None:
        return 0
    scorer.close()
    return scorer.failed
