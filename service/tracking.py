"""The one MLflow writer: sweep → optimisation → iteration.

Everything that MLflow shows is in the stage records, so it can be written at any time, and again. What has been
written is noted in tags of the runs themselves: a server that was away gets the rest when it is back, from this run,
from the next one, or from ``ideal sync``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

import requests
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from sqlalchemy.exc import SQLAlchemyError

from ideal.config import Config
from service import report
from service.mixtures import Iteration, Outcome

KEY = "ideal.key"
"""Tag that finds a run again: what it records."""
WRITTEN = "ideal.written."
"""Tags of the parts that a run holds already."""


def uri_of(config: Config) -> str:
    """The tracking server: the config's, the environment's, or an SQLite file in the storage folder."""
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{config.root / 'mlflow.db'}"


PATIENCE = 60
"""Seconds that a driver waits for another's turn; then it goes on, and writes the next time."""


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
        self.uri = uri_of(config)
        self.behind = False

    def keep_up(self, outcome: Outcome) -> None:
        """Write what there is so far; a server that doesn't answer is tried again next time."""
        self.write(outcome)

    def write(self, outcome: Outcome) -> bool:
        """Write what MLflow hasn't yet; False if it couldn't be reached."""
        return self._attempt(lambda: self._write(outcome))

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
                self.notice(
                    f"MLflow at {self.uri} can't be written ({str(error).splitlines()[0][:200]}); the run goes on. "
                    "What is missing is written when it answers again, or by `ideal sync`"
                )
            self.behind = True
            return False
        if self.behind:
            self.notice(f"MLflow at {self.uri} answers again and has everything")
        self.behind = False
        return True

    def _write_study(self, metrics: dict[str, float]) -> None:
        run = self._run(self.key, self.name, None)
        self._once(run, "config", self._parameters)

        def end(run: Run) -> None:
            self._metrics(run, metrics, 0)
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
        parts: dict[str, dict[str, float]] = {"sft": values}
        if iteration.benchmark:
            parts["benchmark"] = {f"score/{n}": s["value"] for n, s in iteration.benchmark.result.items()}
            parts["benchmark"]["score"] = report.mean_score(iteration.benchmark.result)
        step = iteration.update
        if step and (iteration.table is not None):
            domains = list(iteration.volumes)
            parts["update"] = {f"influence/{d}": v for d, v in zip(domains, step.value, strict=True)}
            parts["update"] |= {f"beta/{d}": v for d, v in zip(domains, step.beta, strict=True)}
        for part, metrics in parts.items():
            for run in runs:
                self._once(run, f"{part}.{position}", lambda r, m=metrics: self._metrics(r, m, number))  # type: ignore[misc]

    def _steps(self, run: Run, iteration: Iteration) -> None:
        now = int(time.time() * 1000)
        logs: list[dict[str, Any]] = json.loads((iteration.sft.folder / "steps.json").read_text())
        metrics = [Metric(name, log[name], now, log["step"]) for log in logs for name in ("loss", "norm")]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(run.info.run_id, metrics=metrics[start : start + 1000])

    def _metrics(self, run: Run, values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(run.info.run_id, metrics=[Metric(k, v, now, step) for k, v in values.items()])

    def _end(self, run: Run, outcome: Outcome) -> None:
        final = {f"equilibrium/{d}": float(v) for d, v in outcome.equilibrium.volumes.items()}
        self._metrics(run, final, outcome.equilibrium.number)
        self.client.log_batch(run.info.run_id, tags=[RunTag("stopped", outcome.stopped)])
        self.client.log_artifacts(run.info.run_id, str(self.folder))
        for position in range(len(outcome.iterations)):
            child = self._run(f"{self.key}/{position}", "", run)
            self.client.set_terminated(child.info.run_id)
        self.client.set_terminated(run.info.run_id)
