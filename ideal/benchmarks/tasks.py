"""From a config's benchmark to lm-eval tasks: found by name, checked without data, loaded, read for texts.

lm-eval's own index of tasks takes many seconds to build, so it is built once in a process, and only for a
benchmark whose `include` folder doesn't hold its task.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lm_eval.utils
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks.manager import TaskDict

from ideal.benchmarks import code_eval, procedural, sandbox, scorers, task_code
from ideal.config.inputs import BenchmarkConfig
from ideal.errors import BadInput

TEMPLATES = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
"""lm-eval's, with jinja's walls: a task file's templates could call anything."""
TEMPLATES.filters.update(lm_eval.utils.env.filters)
FEWSHOT_SEED = 1234  # lm-eval's
Settings = Mapping[str, Any]
LIMIT_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def check(benchmarks: Sequence[BenchmarkConfig], *, allow_code_execution: bool) -> None:
    """Check all that can be known of benchmarks without their data.

    Raises:
        BadInput: a task, reasoning-gym task, option, folder or metric that doesn't exist; a task that runs
            model-written code where that isn't allowed or can't be walled off.
    """
    for benchmark in benchmarks:
        if benchmark.reasoning_gym:
            _check_procedural(benchmark)
        else:
            _check_task(benchmark, allow_code_execution)


def load(benchmarks: Sequence[BenchmarkConfig], *, allow_code_execution: bool) -> dict[str, TaskDict]:
    """Load the tasks and data of benchmarks, by benchmark name: one task each, or those of a group.

    Raises:
        BadInput: as `check`; or the task or its data can't be loaded.
    """
    check(benchmarks, allow_code_execution=allow_code_execution)
    loaded = {}
    lm_eval.utils.env = TEMPLATES
    with code_eval.sandboxed() if allow_code_execution else nullcontext():
        for benchmark in benchmarks:
            try:
                loaded[benchmark.name] = _load(benchmark)
            except BadInput:
                raise
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise BadInput(
                    f"benchmarks.{benchmark.name}",
                    f"its task can't be loaded: {reason}",
                    "check that its data is on this machine or that the hub can be reached",
                ) from error
    return loaded


def questions(benchmarks: Sequence[BenchmarkConfig], *, allow_code_execution: bool) -> list[str]:
    """Every text of all these benchmarks' items that a training prompt could equal.

    Raises:
        BadInput: as `load`.
    """
    loaded = load(benchmarks, allow_code_execution=allow_code_execution)
    return [text for benchmark in loaded.values() for text in documents(benchmark)]


def documents(loaded: TaskDict) -> list[str]:
    """Every text of a benchmark's items that a training prompt could equal.

    That is the question as it is asked, without template and examples, and each field that stands in it.
    """
    texts: dict[str, None] = {}
    for task in loaded["tasks"].values():
        for item in task.eval_docs:
            asked, answer = task.doc_to_text(item), task.doc_to_target(item)
            fields = [value for value in item.values() if isinstance(value, str) and value != answer]
            if isinstance(asked, str):
                fields = [asked, *(field for field in fields if field.strip() in asked)]
            texts |= dict.fromkeys(field.strip() for field in fields if field.strip())
    return list(texts)


def _load(benchmark: BenchmarkConfig) -> TaskDict:
    if benchmark.reasoning_gym:
        task = procedural.make_task(
            benchmark.name,
            benchmark.reasoning_gym,
            size=benchmark.size or 0,
            seed=benchmark.seed,
            options=benchmark.options,
            num_fewshot=benchmark.num_fewshot or 0,
        )
        loaded = TaskDict(tasks={benchmark.name: task})
    else:
        loaded = _manager(benchmark).load([benchmark.task])
    for task in loaded["tasks"].values():
        _configure(task, benchmark)
    return loaded


def _configure(task: Task, benchmark: BenchmarkConfig) -> None:
    shots = benchmark.num_fewshot if benchmark.num_fewshot is not None else task.get_config("num_fewshot")
    task.set_config("num_fewshot", shots or 0)
    task.set_fewshot_seed(FEWSHOT_SEED)
    if benchmark.max_new_tokens and task.OUTPUT_TYPE == "generate_until":
        settings = {
            name: value
            for name, value in (task.get_config("generation_kwargs") or {}).items()
            if name not in LIMIT_NAMES
        }
        task.set_config("generation_kwargs", {**settings, "max_gen_toks": benchmark.max_new_tokens})


def _check_procedural(benchmark: BenchmarkConfig) -> None:
    where = f"benchmarks.{benchmark.name}"
    name = benchmark.reasoning_gym or ""
    if name not in procedural.names():
        raise BadInput(
            f"{where}.reasoning_gym",
            f"reasoning-gym has no task {name!r}",
            _suggest(name, procedural.names()) or f"it has {', '.join(procedural.names())}",
        )
    try:
        procedural.check(name, size=benchmark.size or 0, seed=benchmark.seed, options=benchmark.options)
    except Exception as error:
        raise BadInput(
            f"{where}.options", f"reasoning-gym's {name} refuses them: {error}", f"see {name}'s settings"
        ) from error
    if not scorers.compares_text(name):
        try:
            sandbox.require()
        except BadInput as problem:
            raise BadInput(
                f"{where}.reasoning_gym",
                f"{name}'s scorer may run what the model answers, so that it runs walled off, and {problem.what}",
                "use Linux with util-linux and let it make namespaces, or another task",
            ) from None
    if benchmark.metric and not _matches(benchmark.metric, [procedural.METRIC], ["none"]):
        raise BadInput(f"{where}.metric", f"there is no {benchmark.metric!r}", f"use `{procedural.METRIC}`, or none")


def _check_task(benchmark: BenchmarkConfig, allow_code_execution: bool) -> None:
    where, name = f"benchmarks.{benchmark.name}", benchmark.task or ""
    if benchmark.include and not Path(benchmark.include).is_dir():
        raise BadInput(f"{where}.include", f"{benchmark.include} is no folder", "name a folder of lm-eval task files")
    index = _manager(benchmark).task_index
    if name not in index:
        own = list(_index(benchmark.include, False).task_index) if benchmark.include else []
        raise BadInput(
            f"{where}.task",
            f"there is no task {name!r}, in lm-eval" + (f" or in {benchmark.include}" if own else ""),
            _suggest(name, [*own, *index]) or "`lm-eval ls tasks` lists lm-eval's",
        )
    found = [each for each in _settings(index, name) if each is not None]
    settings = [each for each, _ in found]
    for path in dict.fromkeys(path for _, path in found if path):
        _check_code(benchmark, path, allow_code_execution)
    if any(each.get("unsafe_code", False) is not False for each in settings):
        if not allow_code_execution:
            raise BadInput(
                f"{where}.task",
                f"{name} runs code that the model writes",
                "set `allow_code_execution: true` to run it walled off, or leave this benchmark out",
            )
        sandbox.require()
    if benchmark.metric and not any(_has_metric(each, benchmark.metric) for each in settings):
        raise BadInput(f"{where}.metric", f"{name} has no {benchmark.metric!r}", "see the task's metric_list")


def _check_code(benchmark: BenchmarkConfig, path: Path, allow_code_execution: bool) -> None:
    where = f"benchmarks.{benchmark.name}"
    if task_code.runs_answers(path):
        raise BadInput(
            f"{where}.task",
            f"the code of {path.stem} runs what the model writes by itself, outside the sandbox",
            "leave this benchmark out",
        )
    if path.is_relative_to(task_code.TASKS) or allow_code_execution:
        return
    if own := task_code.own_functions(path):
        raise BadInput(
            f"{where}.include",
            f"{path} brings code of its own ({', '.join(own[:3])}), which would run with all your rights",
            "read it, then set `allow_code_execution: true`; or leave this benchmark out",
        )


def _manager(benchmark: BenchmarkConfig) -> TaskManager:
    """The smallest index that holds the benchmark's task and all parts of it."""
    if benchmark.include and benchmark.task:
        own = _index(benchmark.include, False)
        if benchmark.task in own.task_index:
            whole = all(settings is not None for settings in _settings(own.task_index, benchmark.task))
            return own if whole else _index(benchmark.include, True)
    return _index(None, True)


@functools.cache
def _index(include: str | None, defaults: bool) -> TaskManager:
    return TaskManager(include_path=include, include_defaults=defaults)


def _settings(index: Mapping[str, Entry], name: str) -> Iterator[tuple[Settings, Path | None] | None]:
    """The settings and the file of a task, or of each task in a group or under a tag; None where one isn't indexed."""
    entry = index.get(name)
    if entry is None:
        yield None
    elif entry.kind == Kind.TAG:
        for member in sorted(entry.tags):
            yield from _settings(index, member)
    elif entry.kind == Kind.GROUP:
        yield from _group_settings(index, entry.cfg or {}, entry.yaml_path)
    else:
        yield entry.cfg or {}, entry.yaml_path


def _group_settings(
    index: Mapping[str, Entry], group: Settings, path: Path | None
) -> Iterator[tuple[Settings, Path | None] | None]:
    for part in group["task"] if isinstance(group["task"], list) else []:
        name = part if isinstance(part, str) else part.get("group", part.get("task"))
        if isinstance(part, str) or name in index:
            yield from _settings(index, name)
        elif "group" in part:
            yield from _group_settings(index, part, path)
        else:
            yield part, path


def _has_metric(settings: Settings, metric: str) -> bool:
    """Whether a task may report a metric; where its own code names its metrics, any."""
    names = [each["metric"] for each in settings.get("metric_list") or [{"metric": "/"}]]
    filters = [each["name"] for each in settings.get("filter_list") or [{"name": "none"}]]
    made_up = settings.get("process_results") or any("/" in name for name in names)
    return bool(made_up) or _matches(metric, names, filters)


def _matches(metric: str, names: Sequence[str], filters: Sequence[str]) -> bool:
    name, comma, chosen = metric.partition(",")
    return name in names and (not comma or chosen in filters)


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else ""
