"""A cluster of two nodes as deploy/ describes it, without containers: Ray with a token, MLflow with Postgres and
passwords, two optimisations submitted as jobs, and MLflow's pages in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from playwright.sync_api import Page, sync_playwright

from tests.command import IDEAL, Command
from tests.end_to_end.tiny_run import make_tree
from tests.mlflow_server import Server, on_postgres
from tests.ray_cluster import add_node, start_head
from tests.waiting import HANGS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
BROWSER = shutil.which("chromium")
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with on_postgres(tmp_path_factory.mktemp("mlflow")) as made:
        yield made


@pytest.fixture(scope="module")
def runs(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Run]]:
    """Two optimisations that differ in m, submitted one after another; SFT has a worker on each node."""
    tree = make_tree(tmp_path_factory.mktemp("inputs"), sft_workers=2)
    tree["equilibrium"]["iterations"] = 1
    command = Command(tmp_path_factory.mktemp("cluster"), tree)
    passwords = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": server.password}
    try:
        environment = start_head({**command.environment, **passwords, "MLFLOW_TRACKING_URI": server.url}, cpus=1)
        add_node(environment, cpus=1)
        for m in ("0.4", "0.2"):
            arguments = [IDEAL, "submit", command.config, "--set", f"equilibrium.m={m}"]
            ended = subprocess.run(
                arguments, env=environment, capture_output=True, text=True, timeout=HANGS, check=False
            )
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


@pytest.fixture
def page(server: Server) -> Iterator[Page]:
    """A browser's page that knows the password."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", *QUIET])
        passwords: Any = {"username": "admin", "password": server.password}
        shown = browser.new_page(http_credentials=passwords, viewport={"width": 1900, "height": 1400})
        shown.set_default_timeout(1000 * HANGS)
        yield shown
        browser.close()


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
def test_the_pages_show_a_run_and_compare_two(server: Server, runs: list[Run], page: Page) -> None:
    """The plot of parallel coordinates is drawn as it is."""
    experiment, ids = runs[0].info.experiment_id, [run.info.run_id for run in runs]
    page.goto(f"{server.url}/#/experiments/{experiment}/runs/{ids[0]}")
    for text in ("reference_loss/sums", "objective", "score"):
        page.get_by_text(text, exact=True).first.wait_for()
    asked = f"runs={quote(json.dumps(ids))}&experiments={quote(json.dumps([experiment]))}"
    page.goto(f"{server.url}/#/compare-runs?{asked}")
    for text in ("Comparing 2 Runs from 1 Experiment", "Parallel Coordinates Plot"):
        page.get_by_text(text).first.wait_for()
    page.locator(".parcoords").first.wait_for()
