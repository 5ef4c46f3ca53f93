"""Scores of one model on a config's benchmarks: lm-eval run one by one, and one number from each."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from lm_eval import evaluator
from lm_eval.api.metrics import aggregate_subtask_metrics, unweighted_mean_stderr
from lm_eval.api.model import LM
from lm_eval.tasks.manager import TaskDict

from ideal.benchmarks import procedural, tasks
from ideal.config.inputs import BenchmarkConfig
from ideal.errors import BadInput

SEED = 1234
BOOTSTRAP = 1000


@dataclass(frozen=True)
class Score:
    """A benchmark's score over `items`, in the metric's own unit, with its standard error if there is one.

    Attributes:
        failed: answers that scored 0 because their scorer raised or didn't come to its end.
        by_item: each item's part of the score, whose mean is the score; None where it isn't such a mean.
    """

    metric: str
    value: float
    stderr: float | None
    items: int
    failed: int = 0
    by_item: list[float] | None = field(default=None, compare=False, repr=False)


@runtime_checkable
class Reporting(Protocol):
    """A model that tells how many of its requests are finished, and of how many."""

    progress: Callable[[int, int], None] | None


def evaluate(
    model: LM,
    benchmarks: Sequence[BenchmarkConfig],
    *,
    allow_code_execution: bool,
    progress: Callable[[str, int, int], None],
) -> dict[str, Score]:
    """Score a model on each benchmark.

    Args:
        model: one that has an attribute `progress` is asked how far it is inside a benchmark.
        benchmarks: all tasks are loaded before the first is run.
        allow_code_execution: let tasks run model-written code, walled off.
        progress: called with a benchmark's name, its requests finished and its requests in all; with 0 and 0
            when it starts.

    Raises:
        BadInput: a task that can't be loaded or isn't allowed, or that has no such metric.
    """
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's bootstrap would fork a process that holds an engine
    loaded = tasks.load(benchmarks, allow_code_execution=allow_code_execution)
    scores = {}
    for benchmark in benchmarks:
        progress(benchmark.name, 0, 0)
        random.seed(SEED)  # for each, so that which others are scored here changes nothing
        np.random.seed(SEED)
        if isinstance(model, Reporting):
            model.progress = lambda done, total, name=benchmark.name: progress(name, done, total)
        try:
            results = evaluator.evaluate(
                lm=model,
                task_dict=loaded[benchmark.name],
                limit=benchmark.limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=True,
                system_instruction=benchmark.system,
                apply_chat_template=benchmark.chat,
                fewshot_as_multiturn=benchmark.chat,
                confirm_run_unsafe_code=allow_code_execution,
            )
        finally:
            failed = sum(map(procedural.end_scoring, loaded[benchmark.name]["tasks"].values()))
        found = score(results["results"], loaded[benchmark.name], benchmark)
        samples = [results["samples"][name] for name in loaded[benchmark.name]["tasks"]]
        scores[benchmark.name] = replace(found, failed=failed, by_item=by_item(samples, found))
    return scores


def score(results: Mapping[str, Mapping[str, Any]], loaded: TaskDict, benchmark: BenchmarkConfig) -> Score:
    """The benchmark's number in lm-eval's results: its task's, its group's mean, or the mean of its tasks.

    Raises:
        BadInput: the metric that the config names isn't there.
    """
    parts = [results[name] for name in loaded["tasks"]]
    whole = results.get(benchmark.task or "", {})
    metrics = [key for key in parts[0] if "," in key and "_stderr," not in key]
    means = [key for key in whole if "," in key and "_stderr," not in key]
    wanted = benchmark.metric
    metric = next((key for key in [*means, *metrics] if wanted in (None, key, key.split(",")[0])), None)
    if metric is None or not all(metric in part for part in parts):
        raise BadInput(
            f"benchmarks.{benchmark.name}.metric",
            f"there is no {wanted or metric or 'metric'!r} in its results",
            f"use one of: {', '.join(metrics)}",
        )
    error = metric.replace(",", "_stderr,", 1)
    items = sum(part["sample_len"] for part in parts)
    if metric in whole:
        value, stderr = whole[metric], whole.get(error)
    else:
        sizes = [part["sample_len"] for part in parts]
        value = aggregate_subtask_metrics([part[metric] for part in parts], sizes, weight_by_size=False)
        errors = [part.get(error) for part in parts]
        known = all(isinstance(each, float) for each in errors)
        stderr = unweighted_mean_stderr(cast("list[float]", errors)) if known else None
    return Score(metric, float(value), float(stderr) if isinstance(stderr, (int, float)) else None, items)


def by_item(samples: Sequence[Sequence[Mapping[str, Any]]], score: Score) -> list[float] | None:
    """Each item's part of a score, in the items' own order, so that their mean is the score.

    Args:
        samples: of each task, lm-eval's account of every item.

    Returns:
        None where the score is no mean over items, whether of all alike or of each task's.
    """
    metric, _, filter_ = score.metric.partition(",")
    try:
        values = [
            [float(row[metric]) for row in sorted(task, key=lambda row: row["doc_id"]) if row["filter"] == filter_]
            for task in samples
        ]
    except (KeyError, TypeError, ValueError):
        return None
    everything = sum(map(len, values))
    for scales in ([1.0] * len(values), [everything / (len(values) * max(1, len(task))) for task in values]):
        parts = [scale * value for scale, task in zip(scales, values, strict=True) for value in task]
        if parts and math.isclose(sum(parts) / len(parts), score.value, abs_tol=1e-9):
            return parts
    return None
