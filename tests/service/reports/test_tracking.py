"""MLflow shows an optimisation with its iterations, each number once, whatever the server was doing meanwhile."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from ideal.config.config import Config
from service.outcome import Outcome
from service.reports import report
from service.reports.tracking import Tracker


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store; the first use of one takes seconds."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def uri(config: Config, migrated: Path) -> str:
    config.root.mkdir()
    shutil.copy(migrated, config.root / "mlflow.db")
    return f"sqlite:///{config.root / 'mlflow.db'}"


@pytest.fixture
def away() -> Iterator[str]:
    """An address where nothing answers, and nothing else can begin to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def said() -> list[str]:
    return []


def tracker(config: Config, said: list[str], outcome: Outcome) -> Tracker:
    folder = config.root / "run"
    report.write(folder, config, outcome)
    return Tracker(config, "key", folder, said.append)


def runs(uri: str) -> tuple[Run, list[Run]]:
    """The optimisation, and its iterations in their order."""
    parent, children, count = top(uri)
    assert len(children) == count - 1
    return parent, sorted(children, key=lambda run: run.data.tags["ideal.key"])


def top(uri: str) -> tuple[Run, list[Run], int]:
    """The only run without a parent, those directly below it, and how many there are at all."""
    client = MlflowClient(uri)
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    parents = [run for run in found if MLFLOW_PARENT_RUN_ID not in run.data.tags]
    assert len(parents) == 1
    children = [run for run in found if run.data.tags.get(MLFLOW_PARENT_RUN_ID) == parents[0].info.run_id]
    return parents[0], children, len(found)


def history(uri: str, run: Run, metric: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in MlflowClient(uri).get_metric_history(run.info.run_id, metric)]


def everything(uri: str) -> list[Any]:
    parent, children = runs(uri)
    return [
        [(name, history(uri, run, name)) for name in sorted(run.data.metrics)] + [run.data.params]
        for run in [parent, *children]
    ]


def test_an_optimisation_holds_its_iterations(config: Config, uri: str, said: list[str], outcome: Outcome) -> None:
    assert tracker(config, said, outcome).write(outcome)
    assert not said
    parent, children = runs(uri)
    assert parent.data.tags[MLFLOW_RUN_NAME] == "tiny"
    assert [run.data.tags[MLFLOW_RUN_NAME] for run in children] == ["D0", "D1 (rejected)", "D1"]
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    assert {"m", "seed", "model", "method"} <= set(parent.data.params)
    assert parent.data.params["m"] == "0.8"
    assert history(uri, children[0], "loss") == [(0, 3.0), (1, 2.0), (2, 1.0)]


def test_metrics_have_the_names_that_comparisons_use(
    config: Config, uri: str, said: list[str], outcome: Outcome
) -> None:
    tracker(config, said, outcome).write(outcome)
    parent, _ = runs(uri)
    assert set(parent.data.metrics) == {
        *(f"{kind}/{d}" for kind in ("volume", "beta", "influence", "reference_loss", "equilibrium") for d in DOMAINS),
        "score/sums",
        "score",
        "objective",
    }


DOMAINS = ("math", "chat")


def test_the_optimisation_shows_accepted_iterations_only(
    config: Config, uri: str, said: list[str], outcome: Outcome
) -> None:
    """A rejected mixture is a run to look at, not a point of the curve."""
    outcome.iterations[1].volumes["math"] = 99
    tracker(config, said, outcome).write(outcome)
    parent, children = runs(uri)
    assert history(uri, parent, "volume/math") == [(0, 12.0), (1, 13.0)]
    assert history(uri, parent, "reference_loss/math") == [(0, 1.25), (1, 1.125)]
    assert history(uri, parent, "score/sums") == [(0, 0.25), (1, 0.5)]
    assert history(uri, parent, "beta/chat") == [(0, -0.3)]
    assert history(uri, children[1], "volume/math") == [(1, 99.0)]
    assert parent.data.metrics["equilibrium/math"] == 13


def test_the_report_is_an_artifact(config: Config, uri: str, said: list[str], outcome: Outcome) -> None:
    tracker(config, said, outcome).write(outcome)
    parent, _ = runs(uri)
    names = {file.path for file in MlflowClient(uri).list_artifacts(parent.info.run_id)}
    assert {"config.json", "report.md", "report.json", "volumes-and-scores.png", "influence-D0.png"} <= names
    assert list((config.root / "artifacts").rglob("report.md"))  # in the storage folder, wherever the run started


def test_writing_again_adds_nothing(config: Config, uri: str, said: list[str], outcome: Outcome) -> None:
    """The same tracker, and one of another process."""
    first = tracker(config, said, outcome)
    first.write(outcome)
    before = everything(uri)
    first.write(outcome)
    tracker(config, said, outcome).write(outcome)
    assert everything(uri) == before


def test_killed_before_it_noted_what_it_wrote_it_adds_nothing(
    config: Config, uri: str, said: list[str], outcome: Outcome
) -> None:
    tracker(config, said, outcome).write(outcome)
    before = everything(uri)
    parent, children = runs(uri)
    for run in (parent, *children):
        for tag in [tag for tag in run.data.tags if tag.startswith("ideal.written.")]:
            MlflowClient(uri).delete_tag(run.info.run_id, tag)
    tracker(config, said, outcome).write(outcome)
    assert everything(uri) == before


def test_what_is_written_as_it_happens_is_what_is_written_at_the_end(
    config: Config, uri: str, said: list[str], outcome: Outcome, migrated: Path, tmp_path: Path
) -> None:
    shutil.copy(migrated, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path / 'other.db'}"
    live = tracker(config, said, outcome)
    scored = outcome.iterations[0].benchmark
    outcome.iterations[0].benchmark = None
    for count in range(1, 4):
        live.keep_up(Outcome(outcome.data, outcome.iterations[:count]))
        outcome.iterations[0].benchmark = scored
    live.write(outcome)
    at_once = tracker(config, said, outcome)
    at_once.uri = other
    at_once.write(outcome)
    assert everything(uri) == everything(other)


def test_the_end_waits_for_the_report(config: Config, uri: str, said: list[str], outcome: Outcome) -> None:
    """The last change of an outcome comes before its report is written."""
    found = Tracker(config, "key", config.root / "run", said.append)
    found.keep_up(outcome)
    assert tracker(config, said, outcome).write(outcome)
    assert found.write(outcome)
    assert not said
    parent, _ = runs(uri)
    assert "report.md" in {file.path for file in MlflowClient(uri).list_artifacts(parent.info.run_id)}


def test_two_runs_of_one_experiment_stay_apart(config: Config, uri: str, said: list[str], outcome: Outcome) -> None:
    tracker(config, said, outcome).write(outcome)
    second = tracker(config, said, outcome)
    second.key = "another"
    second.write(outcome)
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("ideal").experiment_id])
    assert len(found) == 8
    assert len([run for run in found if MLFLOW_PARENT_RUN_ID not in run.data.tags]) == 2


def test_a_server_that_is_away_stops_nothing_and_gets_all_later(
    config: Config, uri: str, away: str, said: list[str], outcome: Outcome
) -> None:
    found = tracker(config, said, outcome)
    found.uri = away
    for count in range(1, 3):
        assert found.write(Outcome(outcome.data, outcome.iterations[:count])) is False
    assert len(said) == 1, "it is told once"
    assert away in said[0]
    assert "ideal sync" in said[0]
    assert found.write(outcome) is False
    found.uri = uri  # as if it were back
    assert found.write(outcome)
    assert "answers again" in said[1]
    parent, children = runs(uri)
    assert history(uri, parent, "volume/math") == [(0, 12.0), (1, 13.0)]
    assert len(children) == 3


def test_a_run_that_a_sweep_takes_in_gets_its_name_and_values(
    config: Config, uri: str, said: list[str], outcome: Outcome
) -> None:
    own = tracker(config, said, outcome)
    own.write(outcome)
    below, name, values = ("sweep", "tiny sweep"), "tiny m=0.8", {"equilibrium.m": "0.8"}
    Tracker(config, "key", own.folder, said.append, below=below, name=name, values=values).write(outcome)
    sweep, (trial,), _ = top(uri)
    assert sweep.data.tags[MLFLOW_RUN_NAME] == "tiny sweep"
    assert trial.data.tags[MLFLOW_RUN_NAME] == name
    assert trial.data.params["equilibrium.m"] == "0.8"
    assert not said
