"""A whole run: connect, optimise, record, report; and the same without starting anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from rich.console import Console
from rich.markup import escape

from ideal.config.config import Config
from ideal.errors import BadInput
from service.cluster.cluster import Cluster, connect
from service.cluster.own_ray import stop
from service.cluster.precision import Decision, decide, decided
from service.cluster.progress import Display
from service.outcome import Outcome
from service.reports import handed_over, report
from service.reports.console import notices, point_to
from service.runs.optimisation import optimise
from service.runs.runner import OnWorkers, Recorded, Runner
from service.store.names import run_folder, run_key, run_name
from service.store.remote import remote_of
from service.store.stage import Record
from service.store.store import Records, Store, Unfinished

if TYPE_CHECKING:
    from service.reports.tracking import Tracker


def run(config: Config, console: Console) -> Outcome:
    """Run a config to its end, or go on where it was left; the table comes at the end.

    Raises:
        BadInput: something in it doesn't hold; found before anything is computed, where that can be known.
        StageFailed: a stage broke.
    """
    started, notice = time.monotonic(), notices(console)
    decision = decide([config], notice, begins=True)
    (config,) = decision.configs
    before, display, tracker = replay(config, notice), None, None
    outcome = before
    if outcome.stopped:
        console.print("every stage of this run is recorded: nothing to do")
    else:
        from service.reports.tracking import Tracker

        tracker = Tracker(config, run_key(config), run_folder(config), notice)
        store = Store(config.root, notice, remote_of(config))
        with (
            connected(decision, console, [before]) as cluster,
            Display(console) as display,
            OnWorkers(config, cluster, store, display) as runner,
        ):
            outcome = follow(config, runner, tracker.keep_up)
    path = report.write(run_folder(config), config, outcome)
    hand_over(config, outcome, path, notice, tracker)
    console.print(report.table(outcome))
    seconds = time.monotonic() - started
    outside = f", {seconds - display.busy:.0f} s of them outside stages" if display else ""
    console.print(f"Ended after {seconds:.0f} s{outside}: {outcome.stopped}.")
    point_to(path, config, console)
    return outcome


def follow(config: Config, runner: Runner, happened: Callable[[Outcome], None]) -> Outcome:
    """Choose a config's mixture by its method: this project's, or one that it is to be compared with.

    Args:
        happened: called with the outcome so far after every change of it.
    """
    if config.method == "equilibrium":
        return optimise(config, runner, happened)
    from service.runs.baseline import baseline

    return baseline(config, runner, happened)


def hand_over(
    config: Config, outcome: Outcome, path: Path, notice: Callable[[str], None], tracker: Tracker | None = None
) -> None:
    """Give MLflow what it hasn't of a run whose report is at ``path``.

    Args:
        tracker: that wrote the run as it happened.
    """
    if handed_over.has_all(config, path):
        return
    if tracker is None:
        from service.reports.tracking import Tracker

        tracker = Tracker(config, run_key(config), path.parent, notice)
    if tracker.write(outcome):
        handed_over.note(config, path)


def fidelity(config: Config, console: Console) -> dict[str, Any]:
    """Measure how well influence predicts retraining, or go on where that was left; the tables come at the end.

    Raises:
        BadInput: something in the config or the data doesn't hold.
        StageFailed: a stage broke.
    """
    from service.reports import fidelity_report
    from service.reports.tracking import Tracker
    from service.runs.fidelity import Fidelity, recorded

    notice = notices(console)
    decision = decide([config], notice, begins=True)
    (config,) = decision.configs
    folder = config.root / "fidelity" / run_name(config)
    store = Store(config.root, notice, remote_of(config))
    tracker = Tracker(config, f"fidelity-{run_key(config)}", folder, notice)
    before = recorded(config, Recorded(Records(config.root, notice, remote_of(config))))
    with (
        connected(decision, console, retrained=before) as cluster,
        Display(console) as display,
        OnWorkers(config, cluster, store, display) as runner,
    ):
        findings = Fidelity(config, runner).findings()
    found = fidelity_report.write(folder, findings, config)
    tracker.write_study(fidelity_report.metrics(found))
    for table in fidelity_report.rich_tables(found):
        console.print(table)
    point_to(folder / "fidelity.md", config, console)
    return found


@contextmanager
def connected(
    decision: Decision,
    console: Console,
    outcomes: Sequence[Outcome] = (),
    retrained: Sequence[Record[Any]] | None = None,
) -> Iterator[Cluster]:
    """Checked configs on the cluster of the first; a Ray that was started for them ends with them.

    Args:
        outcomes: of the configs' runs as far as they are recorded.
        retrained: for a fidelity study, its recorded trainings that keep their weights.

    Raises:
        BadInput: something in them doesn't hold, or a stage doesn't fit the cluster or the disk.
    """
    from service.planning import room
    from service.runs import dry_run as check

    config = decision.configs[0]
    check.before_start(config)
    fresh = not ray.is_initialized()
    cluster = connect(config)
    try:
        if retrained is None:
            room.check_runs(decision.configs, cluster, set().union(*(outcome.checkpoints for outcome in outcomes)))
        else:
            room.check_fidelity(config, cluster, [record.folder for record in retrained])
        decision.keep(notices(console))
        console.print(f"[bold]{config.name}[/] on {cluster.describe()}, {decision}; stages in {config.root}")
        yield cluster
    finally:
        if fresh:
            stop()


def sync(config: Config, console: Console) -> bool:
    """Write to MLflow what it hasn't of a run, finished or not; False if it couldn't be reached."""

    def notice(line: str) -> None:
        console.print(escape(line))

    config = decided(config, notice)
    outcome = replay(config, notice)
    if not outcome.iterations:
        raise BadInput("sync", "nothing of this run is recorded yet", "run it first")
    folder = run_folder(config)
    report.write(folder, config, outcome)
    from service.reports.tracking import Tracker

    written = Tracker(config, run_key(config), folder, notice).write(outcome)
    if written:
        console.print(f"MLflow has everything of {config.name}: {handed_over.uri_of(config)}")
    return written


def replay(config: Config, notice: Callable[[str], None]) -> Outcome:
    """What the records say of a run, as far as they go; ``stopped`` only if they go to its end."""
    seen: list[Outcome] = []
    recorded = Recorded(Records(config.root, notice, remote_of(config)))
    try:
        return follow(config, recorded, seen.append)
    except Unfinished:
        nothing: Any = None
        return seen[-1] if seen else Outcome(data=nothing)
