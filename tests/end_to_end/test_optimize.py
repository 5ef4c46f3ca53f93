"""``ideal run`` from its first line to its last: D0 → D1 → D2 on a tiny model, again, and as a job."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from tests.command import IDEAL, Command, Ended
from tests.end_to_end.tiny_run import VOLUMES, make_tree
from tests.ray_cluster import start_head
from tests.waiting import HANGS

COPIES = 3
pytestmark = pytest.mark.timeout(3600)


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
    counts = {
        kind: len(command.records(kind)) for kind in ("model", "examples", "data", "sft", "influence", "benchmark")
    }
    assert counts == {"model": 1, "examples": 1, "data": 1, "sft": 3, "influence": 2, "benchmark": 6}
    folders = list((command.storage / "stages").glob("*/*"))
    assert {path / "stage.json" for path in folders} == set(command.records())
    command.leaves_nothing_running()


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
    assert " on 1 node" not in again.output, "it started a cluster"
    assert table(again.output) == table(whole.output)


HEAVY = ("torch", "transformers", "vllm", "lm_eval", "reasoning_gym", "mlflow", "matplotlib", "ray.train", "ray.tune")
LOADED = f"""
import sys
from service.cli import guarded
status = guarded(["run", sys.argv[1]])
print("loaded:", [name for name in {HEAVY} if name in sys.modules])
sys.exit(status)
"""


def test_a_run_with_nothing_to_do_loads_nothing_that_computes(command: Command, whole: Ended) -> None:
    """What it loads is most of its time."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(command.config)],
        env=command.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout
    assert table(done.stdout) == table(whole.output)
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_a_benchmark_that_is_added_or_changed_is_all_that_runs(command: Command, whole: Ended, tmp_path: Path) -> None:
    """In a copy of the run's records: one benchmark more, which asks no training example, and another's limit."""
    settings = yaml.safe_load(command.config.read_text())
    sums, words = settings["benchmarks"]
    long = {"min_terms": 2, "max_terms": 2, "min_digits": 5, "max_digits": 5}
    settings["benchmarks"] = [sums, {**words, "limit": 4}, {**sums, "name": "long", "options": long, "seed": 3000}]
    changed = Command(tmp_path, settings)
    shutil.copytree(command.storage / "stages", changed.storage / "stages")
    before, old = changed.records(), command.report()
    try:
        ended = changed()
        assert ended.status == 0, ended.output
        ran = [path.parts[-3] for path in set(changed.records()) - set(before)]
        anew = ["benchmark"] * 2 * len(old["iterations"])
        assert sorted(ran) == [*anew, "data"], "nothing is read, trained or estimated again"
        assert {path: changed.records()[path] for path in before} == before
        for mine, other in zip(changed.report()["iterations"], old["iterations"], strict=True):
            assert mine["volumes"] == other["volumes"]
            assert mine["benchmarks"]["sums"] == other["benchmarks"]["sums"]
            assert {name: score["items"] for name, score in mine["benchmarks"].items()} == {
                "sums": 8,
                "words": 4,
                "long": 8,
            }
    finally:
        changed.clean()


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
def environment(command: Command, whole: Ended) -> Iterator[dict[str, str]]:
    """Of the users of a Ray cluster that lets in who has its token."""
    yield start_head(command.environment, cpus=2)
    command.clean()


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The ``ideal`` command on that cluster."""

    def ideal(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        environ = {**environment, **changes}
        return subprocess.run([IDEAL, *arguments], env=environ, capture_output=True, text=True, timeout=HANGS)

    return ideal


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
    command: Command, cluster: Callable[..., subprocess.CompletedProcess[str]], environment: dict[str, str]
) -> None:
    """Ctrl-C only ends following it."""
    other = ("submit", str(command.config), "--set", "seed=7")
    first = cluster(*other, "--no-follow")
    name = first.stdout.split()[0]
    assert f"{name} submitted" in first.stdout
    following = subprocess.Popen(
        [IDEAL, *other], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert following.stdout
    assert f"{name} is there already" in following.stdout.readline()
    assert following.stdout.readline(), "the job says nothing"
    following.send_signal(signal.SIGINT)
    _, errors = following.communicate()
    assert following.returncode == 130
    assert errors == f"stopped following; the job goes on: ideal logs {name} follows it, ideal stop {name} ends it\n"
    assert next(line for line in cluster("status").stdout.splitlines() if name in line).count("RUNNING") == 1
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
