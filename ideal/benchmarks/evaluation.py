"""Scores of one model on a config's benchmarks: lm-eval run one by one, and one number from each."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from lm_eval import evaluator
from lm_eval.api.metrics import aggregate_subtask_metrics, unweighted_mean_stderr
from lm_eval.api.model import LM
from lm_eval.tasks.manager import TaskDict

from ideal.benchmarks import tasks
from ideal.config_inputs import BenchmarkConfig
from ideal.errors import BadInput

SEED = 1234
BOOTSTRAP = 1000


@dataclass(frozen=True)
class Score:
    """A benchmark's score over `items`, in the metric's own unit, with its standard error if there is one."""

    metric: str
    value: float
    stderr: float | None
    items: int


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
        results = evaluator.evaluate(
            lm=model,
            task_dict=loaded[benchmark.name],
            limit=benchmark.limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
            system_instruction=benchmark.system,
            apply_chat_template=benchmark.chat,
            fewshot_as_multiturn=benchmark.chat,
            confirm_run_unsafe_code=allow_code_execution,
        )
        scores[benchmark.name] = score(results["results"], loaded[benchmark.name], benchmark)
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
