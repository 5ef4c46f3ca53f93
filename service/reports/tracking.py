"""The one MLflow writer: sweep → optimisation → iteration.

Everything that MLflow shows is in the stage records, so it can be written at any time, and again. What has been
written is noted in tags of the runs themselves: a server that was away gets the rest when it is back, from this run,
from the next one, or from ``ideal sync``.

A thread writes while stages run, so that no stage waits for a slow server; only the end of a run does. A server is away
when it refuses connections or answers with errors. One that is slow is not: it has minutes for each answer.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import requests
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from sqlalchemy.exc import SQLAlchemyError

from ideal.config.config import Config
from service.outcome import Iteration, Outcome
from service.reports import report
from service.reports.handed_over import check_server, shown, uri_of
from service.store.stage import Record

PATIENCE = 600
"""Seconds for one answer of a server, and for another driver's turn: a server that works has taken 60."""
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(PATIENCE))

KEY = "ideal.key"
"""Tag that finds a run again: what it records."""
WRITTEN = "ideal.written."
"""Tags of the parts that a run holds already."""


class Tracker:
    """Writes an optimisation to MLflow as it happens.

    One driver at a time: two would make the database, or one run, twice.

    Args:
        key: the optimisation's fingerprint.
        folder: where the report is.
        notice: told, once, when the server doesn't answer.
        below: key and name of the sweep that it belongs to.
        name: of the run. Default: the config's.
        values: parameters besides the usual ones.

    Raises:
        BadInput: the config's server would be given another one's password.
    """

    def __init__(
        self,
        config: Config,
        key: str,
        folder: Path,
        notice: Callable[[str], None],
        *,
        below: tuple[str, str] | None = None,
        name: str = "",
        values: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.key, self.folder, self.notice = config, key, folder, notice
        self.below, self.name, self.values = below, name or config.name, values or {}
        check_server(config)
        self.uri = uri_of(config)
        self.behind = False
        self._next: deque[Outcome] = deque(maxlen=1)  # the last outcome holds what those before it did
        self._writer = ThreadPoolExecutor(1, "mlflow")

    def keep_up(self, outcome: Outcome) -> None:
        """Have what there is so far written, and return at once. The end, with the report, is ``write``'s."""
        self._begin(replace(outcome, stopped=""))

    def write(self, outcome: Outcome) -> bool:
        """Write what MLflow hasn't yet, and wait for that; False if it couldn't be reached."""
        self._begin(outcome).result()
        return not self.behind

    def _begin(self, outcome: Outcome) -> Future[None]:
        """The run goes on and changes its outcome meanwhile: what is written is as it is now."""
        self._next.append(replace(outcome, iterations=[replace(each) for each in outcome.iterations]))
        return self._writer.submit(self._write_next)

    def _write_next(self) -> None:
        if self._next:  # else a later outcome took its place, and is written
            outcome = self._next.pop()
            self._attempt(lambda: self._write(outcome))

    def write_study(self, metrics: dict[str, float]) -> bool:
        """Write a study's figures and its folder as one run; False if MLflow couldn't be reached."""
        return self._attempt(lambda: self._write_study(metrics))

    def _attempt(self, write: Callable[[], None]) -> bool:
        try:
            with FileLock(self.config.root / "locks" / "mlflow.lock", timeout=PATIENCE):
                self.client = MlflowClient(self.uri)
                self.experiment = self._experiment()
                write()
        except (MlflowException, SQLAlchemyError, requests.RequestException, OSError) as error:
            if not self.behind:
                reason = str(error).splitlines()[0].replace(self.uri, shown(self.uri))[:200]
                self.notice(
                    f"MLflow at {shown(self.uri)} can't be written ({reason}); the run goes on. "
                    "What is missing is written when it answers again, or by `ideal sync`"
                )
            self.behind = True
            return False
        if self.behind:
            self.notice(f"MLflow at {shown(self.uri)} answers again and has everything")
        self.behind = False
        return True

    def _write_study(self, metrics: dict[str, float]) -> None:
        run = self._run(self.key, self.name, None)
        self._once(run, "config", self._parameters)

        def end(run: Run) -> None:
            self._metrics(run, metrics, 0, run.info.start_time)
            self.client.log_artifacts(run.info.run_id, str(self.folder))
            self.client.set_terminated(run.info.run_id)

        self._once(run, "end", end)

    def _write(self, outcome: Outcome) -> None:
        above = self._run(*self.below, None) if self.below else None
        parent = self._run(self.key, self.name, above)
        self._once(parent, "config", self._parameters)
        if self.values:
            self._once(parent, "/".join(["values", *self.values]), self._values)
        for position, iteration in enumerate(outcome.iterations):
            self._iteration(parent, position, iteration)
        if outcome.stopped:
            self._once(parent, "end", lambda run: self._end(run, outcome))

    def _experiment(self) -> str:
        name = self.config.tracking.experiment
        found: Experiment | None = self.client.get_experiment_by_name(name)
        if found:
            return str(found.experiment_id)
        local = self.uri.startswith("sqlite:")
        place = (self.config.root / "artifacts").as_uri() if local else None
        return str(self.client.create_experiment(name, artifact_location=place))

    def _run(self, key: str, name: str, parent: Run | None) -> Run:
        found = self.client.search_runs([self.experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
        tags = {MLFLOW_PARENT_RUN_ID: parent.info.run_id, MLFLOW_RUN_NAME: name} if parent else {}
        if not found:
            return self.client.create_run(self.experiment, tags={KEY: key, MLFLOW_RUN_NAME: name, **tags})
        run: Run = found[0]
        for tag, value in tags.items():
            if run.data.tags.get(tag) != value:  # a run of its own that a sweep takes in
                self.client.set_tag(run.info.run_id, tag, value)
        return run

    def _once(self, run: Run, part: str, write: Callable[[Run], None]) -> None:
        tag = WRITTEN + part
        if tag not in run.data.tags:
            write(run)
            self.client.set_tag(run.info.run_id, tag, "yes")
            run.data.tags[tag] = "yes"

    def _parameters(self, run: Run) -> None:
        c = self.config
        parameters = {
            "m": c.equilibrium.m,
            "seed": c.seed,
            "model": c.model.source,
            "method": f"equilibrium/{c.equilibrium.rule}" if c.method == "equilibrium" else c.method,
            "solver": c.influence.solver,
            "damping": c.influence.damping,
            "iterations": c.equilibrium.iterations,
            "learning_rate": c.sft.learning_rate,
            "epochs": c.sft.epochs,
        }
        self.client.log_batch(run.info.run_id, params=[Param(k, str(v)) for k, v in parameters.items()])
        self.client.log_text(run.info.run_id, json.dumps(c.model_dump(mode="json"), indent=1), "config.json")

    def _values(self, run: Run) -> None:
        self.client.log_batch(run.info.run_id, params=[Param(k, str(v)) for k, v in self.values.items()])

    def _iteration(self, parent: Run, position: int, iteration: Iteration) -> None:
        child = self._run(f"{self.key}/{position}", report.label(iteration), parent)
        number = iteration.number
        values = {f"volume/{d}": float(v) for d, v in iteration.volumes.items()}
        values |= {f"reference_loss/{d}": r["loss"] for d, r in iteration.reference.result.items()}
        values["objective"] = iteration.loss
        runs = [child, parent] if iteration.accepted else [child]
        self._once(child, "steps", lambda run: self._steps(run, iteration))
        parts: dict[str, tuple[dict[str, float], Record[Any]]] = {"sft": (values, iteration.reference)}
        if iteration.benchmark:
            scores = {f"score/{n}": s["value"] for n, s in iteration.benchmark.result.items()}
            scores["score"] = report.mean_score(iteration.benchmark.result)
            parts["benchmark"] = (scores, iteration.benchmark)
        step = iteration.update
        if step and iteration.influence:
            domains = list(iteration.volumes)
            change = {f"influence/{d}": v for d, v in zip(domains, step.value, strict=True)}
            change |= {f"beta/{d}": v for d, v in zip(domains, step.beta, strict=True)}
            parts["update"] = (change, iteration.influence)
        for part, (metrics, record) in parts.items():
            for run in runs:
                write = partial(self._metrics, values=metrics, step=number, when=_recorded(record))
                self._once(run, f"{part}.{position}", write)

    def _steps(self, run: Run, iteration: Iteration) -> None:
        if iteration.sft.kind != "sft":
            return  # the base model, which no step was taken from
        when = _recorded(iteration.sft)
        logs: list[dict[str, Any]] = json.loads((iteration.sft.folder / "steps.json").read_text())
        metrics = [Metric(name, log[name], when, log["step"]) for log in logs for name in ("loss", "norm")]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(run.info.run_id, metrics=metrics[start : start + 1000])

    def _metrics(self, run: Run, values: dict[str, float], step: int, when: int) -> None:
        self.client.log_batch(run.info.run_id, metrics=[Metric(k, v, when, step) for k, v in values.items()])

    def _end(self, run: Run, outcome: Outcome) -> None:
        final = {f"equilibrium/{d}": float(v) for d, v in outcome.equilibrium.volumes.items()}
        self._metrics(run, final, outcome.equilibrium.number, _recorded(outcome.equilibrium.reference))
        self.client.log_batch(run.info.run_id, tags=[RunTag("stopped", outcome.stopped)])
        self.client.log_artifacts(run.info.run_id, str(self.folder))
        for position in range(len(outcome.iterations)):
            child = self._run(f"{self.key}/{position}", "", run)
            self.client.set_terminated(child.info.run_id)
        self.client.set_terminated(run.info.run_id)


def _recorded(record: Record[Any]) -> int:
    """When a stage was recorded, in ms. A number that is written again at its own time is in MLflow once."""
    return int(record.folder.stat().st_mtime * 1000)
