"""The MLflow of ``deploy/compose.yaml`` as far as it runs without Docker: its command, Postgres, passwords."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

from ideal.config.config import Config
from service.outcome import Outcome
from service.reports.tracking import Tracker
from tests.mlflow_server import Server, Slow, on_postgres
from tests.waiting import HANGS


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with on_postgres(tmp_path_factory.mktemp("mlflow")) as made:
        yield made


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
    assert tracker.write(outcome), (said, server.said())
    assert "answers again" in said[1]

    client = MlflowClient(server.url)
    found = client.search_runs([client.get_experiment_by_name("ideal").experiment_id])
    assert len(found) == 4, "the optimisation and its three iterations, once each"
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(parent.info.run_id, "objective")] == [0, 1]
    assert "report.md" in {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_a_slow_server_is_not_away_and_no_run_waits_for_it(
    config: Config, outcome: Outcome, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers nothing until all iterations are handed over, however long that takes."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.password)
    said: list[str] = []
    with Slow(server.port) as slow:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", slow.url)
        tracker = Tracker(config, "the-slow-run", tmp_path, said.append)
        for count in range(1, 4):
            tracker.keep_up(Outcome(outcome.data, outcome.iterations[:count]))
        assert slow.asked.wait(HANGS)
        slow.answers.set()
        assert tracker.write(Outcome(outcome.data, outcome.iterations)), (said, server.said())
    assert not said
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() >= 5 * 60
    client = MlflowClient(server.url)
    experiment = client.get_experiment_by_name("ideal").experiment_id
    (parent,) = client.search_runs([experiment], "tags.`ideal.key` = 'the-slow-run'")
    assert [m.step for m in client.get_metric_history(parent.info.run_id, "objective")] == [0, 1]


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
