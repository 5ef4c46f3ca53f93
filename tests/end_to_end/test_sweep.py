"""``ideal sweep`` from its first line to its last: two trials at a time on fewer CPUs than both want."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from tests.command import Command, Ended
from tests.end_to_end.tiny_run import make_tree

pytestmark = pytest.mark.timeout(3600)
SWEEP = ("sweep", "--m", "0.2,0.4")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = make_tree(tmp_path_factory.mktemp("inputs"))
    made["equilibrium"]["iterations"] = 1
    return made


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> Iterator[Command]:
    made = Command(tmp_path_factory.mktemp("sweep"), tree)
    yield made
    made.clean()


@pytest.fixture(scope="module")
def swept(command: Command, tree: dict[str, Any]) -> Ended:
    """Killed while D0's influence is computed, and started again."""
    half = command.storage / "stages" / "influence"
    return command.killed_and_again(
        *SWEEP, when=lambda: command.records("sft") and list(half.glob("*/*/*/*")), before="influence"
    )


def found(command: Command) -> dict[str, Any]:
    (path,) = (command.storage / "sweeps").glob("*/sweep.json")
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def test_trials_share_what_does_not_depend_on_m(command: Command, swept: Ended) -> None:
    assert swept.status == 0, swept.output
    counts = {
        kind: len(command.records(kind)) for kind in ("model", "examples", "data", "sft", "influence", "reference")
    }
    assert counts == {"model": 1, "examples": 1, "data": 1, "sft": 3, "influence": 1, "reference": 3}
    assert len(command.records("benchmark")) == 6
    command.leaves_nothing_running()


def test_it_ends_with_the_best_m_and_what_it_cost(command: Command, swept: Ended) -> None:
    for line in ("m=0.2 │", "m=0.4 │", "Best on the reference sets: m=0.", "of them lie between 0.", "shared none"):
        assert line in swept.output
    assert "Traceback" not in swept.output
    read = found(command)
    objectives = {t["label"]: t["objectives"] for t in read["trials"]}
    assert [len(each) for each in objectives.values()] == [2, 2]
    assert objectives["m=0.2"][0] == objectives["m=0.4"][0]
    losses = {s["label"]: s["loss"] for s in read["settings"]}
    assert losses == {label: pytest.approx(each[-1], rel=1e-6) for label, each in objectives.items()}
    assert read["best"] == min(losses, key=lambda label: losses[label])
    cost = read["cost"]
    assert (cost["stages"], cost["apart"]) == (2 + 5 + 2 * 4, 2 * 11)  # the data's two, D0's five, each D1's four


def test_mlflow_has_sweep_optimisations_and_iterations(command: Command, swept: Ended) -> None:
    client = MlflowClient(f"sqlite:///{command.storage / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("ideal").experiment_id])

    def below(parent: Run | None) -> list[Run]:
        key = parent.info.run_id if parent else None
        return [run for run in runs if run.data.tags.get(MLFLOW_PARENT_RUN_ID) == key]

    (sweep,) = below(None)
    trials = below(sweep)
    assert {run.data.tags[MLFLOW_RUN_NAME] for run in trials} == {"tiny m=0.2", "tiny m=0.4"}
    assert {run.data.params["equilibrium.m"] for run in trials} == {"0.2", "0.4"}
    for run in trials:
        assert {"objective", "score"} <= set(run.data.metrics)
        assert [each.data.tags[MLFLOW_RUN_NAME] for each in sorted(below(run), key=lambda r: r.info.start_time)] == [
            "D0",
            "D1",
        ]
        assert run.info.status == "FINISHED"
        assert "report.md" in {file.path for file in client.list_artifacts(run.info.run_id)}


def test_a_second_sweep_and_its_runs_do_no_work(command: Command, swept: Ended) -> None:
    before = command.records()
    again = command(*SWEEP)
    assert again.status == 0, again.output
    assert "nothing to do" in again.output
    assert found(command)["cost"]["fresh"] == 0
    assert command.records() == before
    one = command("run", "--set", "equilibrium.m=0.4")
    assert "nothing to do" in one.output


def test_only_trials_that_are_not_at_their_end_start(command: Command, swept: Ended) -> None:
    """A lost stage of one trial, so that it has to go on."""
    reports = [json.loads(path.read_text()) for path in (command.storage / "runs").glob("*/report.json")]
    (last,) = [report["iterations"][-1] for report in reports if report["iterations"][-1]["m"] == 0.4]
    shutil.rmtree(command.storage / "stages" / "benchmark" / last["stages"]["benchmark sums"]["fingerprint"])
    again = command(*SWEEP)
    assert again.status == 0, again.output
    assert found(command)["cost"]["fresh"] == 1
    started = [folder.name for folder in (command.storage / "sweeps" / "tune").glob("*/*") if folder.is_dir()]
    assert len(started) == 1, started
    assert "m_0_4" in started[0]
