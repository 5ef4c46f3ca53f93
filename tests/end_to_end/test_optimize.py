"""``ideal run`` from its first line to its last: D0 → D1 → D2 on a tiny model, again, as a job, and killed in
the middle."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from tests.command import IDEAL, Command, Ended, same
from tests.end_to_end.tiny_run import VOLUMES, make_tree
from tests.ray_cluster import start_head

COPIES = 3
pytestmark = pytest.mark.timeout(900)  # minutes, where the machine is shared


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_tree(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> Iterator[Command]:
    made = Command(tmp_path_factory.mktemp("whole"), tree)
    yield made
    made.clean()


@pytest.fixture(scope="module")
def whole(command: Command) -> Ended:
    """The run that nothing disturbs."""
    return command()


def test_it_ends_with_its_table_and_where_to_look(command: Command, whole: Ended) -> None:
    assert whole.status == 0, whole.output
    for word in ("D0", "D1", "D2", "volume (examples)", "reference loss", "benchmark score", "all 2 iterations done"):
        assert word in whole.output
    (report,) = (command.storage / "runs").glob("*/report.md")
    assert f"Report: {report}" in whole.output
    assert f"mlflow ui --backend-store-uri sqlite:///{command.storage}/mlflow.db" in whole.output
    assert "Traceback" not in whole.output


@pytest.mark.usefixtures("whole")
def test_every_stage_is_recorded_once_and_nothing_else_is_left(command: Command) -> None:
    counts = {kind: len(command.records(kind)) for kind in ("model", "data", "sft", "influence", "benchmark")}
    assert counts == {"model": 1, "data": 1, "sft": 3, "influence": 2, "benchmark": 3}
    folders = list((command.storage / "stages").glob("*/*"))
    assert {path / "stage.json" for path in folders} == set(command.records())
    assert command.alone(60), command.processes()


@pytest.mark.usefixtures("whole")
def test_volumes_keep_their_total(command: Command) -> None:
    volumes = [each["volumes"] for each in command.report()["iterations"]]
    assert volumes[0] == VOLUMES
    assert len({tuple(each.values()) for each in volumes}) == COPIES, "a mixture didn't change"
    assert {sum(each.values()) for each in volumes} == {sum(VOLUMES.values())}


@pytest.mark.usefixtures("whole")
def test_mlflow_has_the_optimisation_with_its_iterations(command: Command) -> None:
    client = MlflowClient(f"sqlite:///{command.storage / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("ideal").experiment_id])
    (parent,) = [run for run in found if MLFLOW_PARENT_RUN_ID not in run.data.tags]
    children = [run for run in found if run.data.tags.get(MLFLOW_PARENT_RUN_ID) == parent.info.run_id]
    assert len(children) == COPIES
    history = client.get_metric_history(parent.info.run_id, "objective")
    assert [m.step for m in history] == [0, 1, 2]
    assert [m.value for m in history] == [each["objective"] for each in command.report()["iterations"]]


def test_a_second_run_does_no_work(command: Command, whole: Ended) -> None:
    before = command.records()
    again = command()
    assert again.status == 0
    assert "nothing to do" in again.output
    assert command.records() == before
    assert again.seconds < whole.seconds / 2
    assert table(again.output) == table(whole.output)


def table(output: str) -> list[str]:
    return [line for line in output.splitlines() if "│" in line]


def test_sensitivity_needs_nothing_but_the_records(command: Command, whole: Ended) -> None:
    before = command.records()
    ended = command("sensitivity")
    assert ended.status == 0, ended.output
    assert "half of it, against the other half" in ended.output
    assert {path.name for path in (command.storage / "runs").glob("*/sensitivity.*")} == {
        "sensitivity.json",
        "sensitivity.md",
    }
    assert command.records() == before


@pytest.fixture(scope="module")
def cluster(command: Command, whole: Ended) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """The ``ideal`` command on a Ray cluster that lets in who has its token."""
    environment = start_head(command.environment, cpus=2)

    def ideal(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        environ = {**environment, **changes}
        return subprocess.run([IDEAL, *arguments], env=environ, capture_output=True, text=True, timeout=300)

    yield ideal
    command.clean()


def test_a_submitted_run_is_a_job_of_its_own(
    command: Command, cluster: Callable[..., subprocess.CompletedProcess[str]], whole: Ended
) -> None:
    """Its output comes back, what is recorded is not done again, and it has the run's own name."""
    before = command.records()
    done = cluster("submit", str(command.config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing to do" in done.stdout
    assert table(done.stdout) == table(whole.output)
    assert command.records() == before
    (report,) = (command.storage / "runs").glob("*/report.md")
    name = report.parent.name
    assert f"{name} submitted" in done.stdout
    listed = next(line for line in cluster("status").stdout.splitlines() if name in line)
    assert "SUCCEEDED" in listed
    assert "nothing to do" in cluster("logs", name, "--no-follow").stdout
    again = cluster("submit", str(command.config))
    assert again.returncode == 0
    assert "it goes on from its records" in again.stdout


def test_a_submitted_run_is_there_once_and_can_be_stopped(
    command: Command, cluster: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    other = ("submit", str(command.config), "--set", "seed=7", "--no-follow")
    first, second = cluster(*other), cluster(*other)
    name = first.stdout.split()[0]
    assert f"{name} submitted" in first.stdout
    assert f"{name} is there already" in second.stdout
    stopped = cluster("stop", name)
    assert stopped.returncode == 0, stopped.stderr
    assert next(line for line in cluster("status").stdout.splitlines() if name in line).count("STOPPED") == 1
    assert "had ended already" in cluster("stop", name).stdout


def test_without_its_token_a_cluster_lets_no_one_in(
    command: Command, cluster: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    for arguments in (["status"], ["submit", str(command.config)]):
        ended = cluster(*arguments, RAY_AUTH_TOKEN="another-token-0123456789-0123456789")
        assert ended.returncode == 2, ended.stdout
        assert "no job API lets us in" in ended.stderr
        assert "Traceback" not in ended.stderr
    unknown = cluster("logs", "nothing")
    assert unknown.returncode == 2
    assert "there is no nothing on this cluster" in unknown.stderr


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(
    tmp_path: Path, tree: dict[str, Any], command: Command, whole: Ended
) -> None:
    """Killed with SIGKILL while influence and benchmarks of D0 run: the second start trains no D0 again."""
    killed = Command(tmp_path, tree)
    try:
        half = killed.storage / "stages" / "influence"
        ended = killed.killed_and_again(
            when=lambda: killed.records("sft") and list(half.glob("*/*/*/*")), before="influence"
        )
        assert ended.status == 0, ended.output
        same(killed.report(), command.report())
        assert {path.parent.name for path in killed.records()} == {path.parent.name for path in command.records()}
    finally:
        killed.clean()
