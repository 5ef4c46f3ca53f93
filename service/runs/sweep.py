"""A sweep: one optimisation for each point of a grid over the config, as a Ray Tune experiment.

    m = 0.15 ─┐                    ┌─▶ D1 ─▶ D2
    m = 0.3  ─┼─▶ D0, its influence┼─▶ D1 ─▶ D2      stages with the same inputs are one stage: the first trial
    m = 0.5  ─┘     (once)         └─▶ D1 ─▶ D2      runs it, the others wait at its lock

Tune decides which trials run and stops those that fall behind. A trial of Tune's only passes reports on: the
optimisation runs in an actor of its own, outside the trial's placement group, so that its stages reserve what the
cluster has, as they do for a single run. A sweep that was killed is started again: what is recorded isn't repeated.
"""

from __future__ import annotations

import io
import itertools
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any, cast

import ray
from ray import tune
from ray.tune.schedulers import MedianStoppingRule, TrialScheduler
from ray.util.queue import Queue
from rich.console import Console
from rich.markup import escape

from ideal.config.file import load
from ideal.errors import BadInput
from service.cluster.cluster import Cluster
from service.cluster.engines import engines, fits_all
from service.cluster.precision import decide
from service.cluster.progress import Display
from service.errors import StageFailed
from service.outcome import Outcome, Trial, Trials, sweep_key
from service.reports import report
from service.reports.console import notices
from service.reports.tracking import Tracker
from service.runs.run import connected, follow, replay
from service.runs.runner import OnWorkers
from service.store.names import run_folder, run_key
from service.store.remote import remote_of
from service.store.store import Store

PATIENCE = 7 * 24 * 3600
"""Seconds that a trial waits for resources: the other trials hold them, and give them back."""

LINE = 200
"""Columns of a trial's output."""


def grid(path: str | Path, overrides: list[str] | None, values: Mapping[str, list[str]]) -> list[Trial]:
    """Every combination of values, each a config that holds.

    Args:
        values: by the config's path, e.g. ``{"equilibrium.m": ["0.15", "0.3"]}``.

    Raises:
        BadInput: no value, a field that doesn't hold, or one run twice.
    """
    if not values or not all(values.values()):
        raise BadInput("sweep", "there is nothing to sweep over", "e.g. --m 0.15,0.3,0.5")
    trials: dict[str, Trial] = {}
    for point in itertools.product(*values.values()):
        chosen = dict(zip(values, point, strict=True))
        assignments = [f"{key}={value}" for key, value in chosen.items()]
        config = load(path, [*(overrides or []), *assignments])
        label = ", ".join(assignment.removeprefix("equilibrium.") for assignment in assignments)
        if run_key(config) in trials:
            raise BadInput("sweep", f"{label} is the same run as {trials[run_key(config)].label}", "leave one out")
        trials[run_key(config)] = Trial(label, chosen, config)
    return list(trials.values())


def run_trials(
    trials: list[Trial], console: Console, *, concurrent: int, stop_behind: bool, kind: str = "sweep"
) -> Trials:
    """Run all trials to their ends, or go on where they were left.

    Args:
        concurrent: trials at a time.
        stop_behind: stop a trial whose best reference loss is worse than the others' median (Golovin et al. 2017).
        kind: what MLflow calls the trials' parent.

    Raises:
        BadInput: something in a config or the data doesn't hold.
        StageFailed: a trial broke while the others ended, or Tune ended before the trials did.
    """
    started = time.monotonic()
    decision = decide([trial.config for trial in trials], notices(console), begins=True)
    trials = [replace(trial, config=config) for trial, config in zip(trials, decision.configs, strict=True)]
    runs = {run_key(trial.config): trial.label for trial in trials}
    if twice := [trial.label for trial in trials if runs[run_key(trial.config)] != trial.label]:
        raise BadInput(kind, f"{twice[0]} is a run that another names, too, since `auto` is {decision}", "leave it out")
    key = sweep_key(trials)
    trackers = {trial.label: tracker_of(trial, kind, key, console) for trial in trials}
    before = [replay(trial.config, lambda _: None) for trial in trials]
    recorded = {record.folder for outcome in before for record in outcome.records if record}
    failed: list[str] = []
    left = [trial for trial, outcome in zip(trials, before, strict=True) if not outcome.stopped]
    if not left:
        console.print(f"every stage of this {kind} is recorded: nothing to do")
    else:
        running = trials if stop_behind else left  # a median is one of all trials
        with connected(decision, console, before) as cluster:
            lines = Queue(actor_options={"num_cpus": 0})
            listener = Thread(target=_listen, args=(lines, {t.label: t for t in trials}, trackers, console))
            listener.start()
            try:
                failed = _tune(key, running, replace(cluster, shared=concurrent > 1), lines, concurrent, stop_behind)
            finally:
                lines.put(None)
                listener.join()
    outcomes = [_keep_up(trial, trackers[trial.label]) for trial in trials]
    if failed:
        raise StageFailed(
            f"{len(failed)} of {len(trials)} trials failed: {'; '.join(failed)}\n"
            "  → their errors are above; the same command runs what is missing"
        )
    ended = [outcome.iterations if stop_behind else outcome.stopped for outcome in outcomes]
    if not all(ended):
        unfinished = [trial.label for trial, end in zip(trials, ended, strict=True) if not end]
        raise StageFailed(
            f"{len(unfinished)} of {len(trials)} trials aren't at their end: {'; '.join(unfinished)}\n"
            "  → the same command runs what is missing"
        )
    return Trials(trials, outcomes, time.monotonic() - started, recorded)


def tracker_of(trial: Trial, kind: str, key: str, console: Console) -> Tracker:
    """What writes a trial's optimisation to MLflow, below its sweep."""
    config = trial.config
    return Tracker(
        config,
        run_key(config),
        run_folder(config),
        notices(console),
        below=(f"{kind}-{key}", f"{config.name} {kind}"),
        name=f"{config.name} {trial.label}",
        values=trial.values,
    )


def _tune(
    name: str, trials: list[Trial], cluster: Cluster, lines: Queue, concurrent: int, stop_behind: bool
) -> list[str]:
    """Run the experiment; the labels of trials that failed."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial says itself what went wrong
    folder = trials[0].config.root / "sweeps" / "tune"
    shutil.rmtree(folder / name, ignore_errors=True)  # what counts is in the stages
    kept = engines(trials[0].config, cluster) if not cluster.gpus and fits_all([t.config for t in trials]) else []
    trainable = tune.with_parameters(
        _trial, trials={t.label: t for t in trials}, cluster=cluster, lines=lines, engines=kept
    )
    rule: TrialScheduler | None = None
    if stop_behind:
        rule = MedianStoppingRule(time_attr="training_iteration", grace_period=2, min_samples_required=2)
    try:
        results = tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory([{"memory": 1}])),  # a trial waits for its actor
            param_space={"trial": tune.grid_search([trial.label for trial in trials])},
            tune_config=tune.TuneConfig(metric="loss", mode="min", max_concurrent_trials=concurrent, scheduler=rule),
            run_config=tune.RunConfig(
                name=name, storage_path=str(folder), verbose=0, failure_config=tune.FailureConfig(max_failures=2)
            ),
        ).fit()
    finally:
        for engine in kept:
            ray.kill(engine)
    ended = [results[number] for number in range(len(results))]
    return [str((result.config or {})["trial"]) for result in ended if result.error]


def _trial(point: dict[str, str], trials: dict[str, Trial], cluster: Cluster, lines: Queue, engines: list[Any]) -> None:
    """Tune's side of a trial: every loss of its optimisation, as it comes."""
    trial = trials[point["trial"]]
    actor = Optimiser.options(scheduling_strategy="DEFAULT").remote()  # type: ignore[attr-defined]
    try:
        for loss in actor.run.remote(trial, cluster, lines, engines):
            tune.report({"loss": ray.get(loss)})
    finally:
        ray.kill(actor)


@ray.remote(num_cpus=0)
class Optimiser:
    """One optimisation. An actor, since what an actor reserved is given back when it is killed."""

    def run(self, trial: Trial, cluster: Cluster, lines: Queue, engines: list[Any]) -> Iterator[float]:
        """The reference loss after every training."""
        found: SimpleQueue[float | None] = SimpleQueue()
        console = Console(file=cast(IO[str], _Lines(lines, trial.label)), width=LINE)
        config = trial.config
        resources = config.resources.model_copy(update={"wait_seconds": PATIENCE})
        reported = 0

        def happened(outcome: Outcome) -> None:
            nonlocal reported
            if len(outcome.iterations) > reported:
                reported = len(outcome.iterations)
                found.put(outcome.iterations[-1].loss)
            lines.put((trial.label, None))

        def optimise() -> None:
            store = Store(config.root, notices(console), remote_of(config))
            with Display(console) as display:
                patient = config.model_copy(update={"resources": resources})
                with OnWorkers(patient, cluster, store, display, engines) as runner:
                    follow(patient, runner, happened)

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(optimise)
            future.add_done_callback(lambda _: found.put(None))
            while (loss := found.get()) is not None:
                yield loss
            try:
                future.result()
            except (BadInput, StageFailed) as error:
                console.print(f"[red]failed[/] {escape(str(error))}")
                raise


class _Lines(io.TextIOBase):
    """A file whose lines go to the sweep's screen."""

    def __init__(self, lines: Queue, label: str) -> None:
        self.lines, self.label, self.rest = lines, label, ""

    def write(self, text: str) -> int:
        *whole, self.rest = (self.rest + text).split("\n")
        for line in whole:
            self.lines.put((self.label, line))
        return len(text)


def _keep_up(trial: Trial, tracker: Tracker) -> Outcome:
    """Write to MLflow what a trial's records say, and once it is at its end its report."""
    outcome = replay(trial.config, lambda _: None)
    if outcome.stopped:
        report.write(run_folder(trial.config), trial.config, outcome)
        tracker.write(outcome)
    elif outcome.iterations:
        tracker.keep_up(outcome)
    return outcome


def _listen(lines: Queue, trials: Mapping[str, Trial], trackers: Mapping[str, Tracker], console: Console) -> None:
    """Show what trials say, and keep MLflow up with them: this process is its only writer."""
    while (said := lines.get()) is not None:
        label, line = said
        if line is None:
            _keep_up(trials[label], trackers[label])
        else:
            console.print(escape(f"{label} │ {line}"), soft_wrap=True)
