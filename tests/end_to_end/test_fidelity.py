"""``ideal fidelity`` on planted relations: what helps, what contradicts and what is noise must come out as that, both
by retraining and by prediction."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from service.reports.fidelity_report import FORMS, TRIVIAL
from tests.command import Command, Ended
from tests.end_to_end.codes import MADE, SFT, file
from tests.waiting import HANGS

DOMAINS = ["plain", "twin", "contrary", "noise"]
SOLVERS = ["kfac", "joint", "exact"]
pytestmark = pytest.mark.timeout(3600)


def settings(folder: Path) -> dict[str, Any]:
    corpus = [file(folder, "corpus", "corpus", 480, 20_000)]
    return {
        "name": "planted",
        "model": {
            "source": "made",
            "max_tokens": 64,
            "made": {"corpus": corpus, **MADE},
        },
        "domains": [
            {
                "name": kind,
                "volume": 96,
                "train": file(folder, kind, "train", 192, 0),
                "reference": file(
                    folder, "plain" if kind == "noise" else kind, f"{kind}-reference", 48, 10_000 + 100 * number
                ),
            }
            for number, kind in enumerate(DOMAINS)
        ],
        "benchmarks": [{"name": "unused", "reasoning_gym": "chain_sum", "size": 4}],
        "sft": SFT,
        "resources": {"wait_seconds": HANGS},
        "influence": {"blocks": 4, "examples": 96, "precision": "fp32"},
        "fidelity": {
            "seeds": 4,
            "change": 0.5,
            "modes": ["steps"],
            "solvers": {
                "kfac": {"solver": "kfac", "joint": False, "damping": 0.1},
                "joint": {"solver": "kfac", "joint": True},
                "exact": {"solver": "exact", "damping": "schedule"},
            },
        },
    }


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    folder = tmp_path_factory.mktemp("fidelity")
    made = Command(folder, settings(folder))
    yield made
    made.clean()


@pytest.fixture(scope="module")
def study(command: Command) -> Ended:
    return command("fidelity")


@pytest.fixture(scope="module")
def found(command: Command, study: Ended) -> dict[str, Any]:
    assert study.status == 0, study.output
    (path,) = (command.storage / "fidelity").glob("*/fidelity.json")
    read: dict[str, Any] = json.loads(path.read_text())
    return read


@pytest.mark.parametrize("of", ["actual", *SOLVERS])
def test_planted_relations_come_out(found: dict[str, Any], of: str) -> None:
    """dQ_r/dβ_j < 0: more of domain j lowers the loss on reference set r."""
    steps = found["modes"]["steps"]
    moves = np.array(steps["actual"] if of == "actual" else steps["predicted"][of])
    at = {name: number for number, name in enumerate(DOMAINS)}
    assert (np.diag(moves)[:3] < 0).all(), "a domain helps its own kind"
    assert moves[at["twin"], at["plain"]] < 0, "a shared skill helps"
    assert moves[at["plain"], at["twin"]] < 0
    assert moves[at["contrary"], at["plain"]] > 0, "contradicting answers hurt"
    assert moves[at["plain"], at["contrary"]] > 0
    worth = -moves[:, at["plain"]]
    assert worth[at["noise"]] < worth[at["twin"]], "noise is worth less than the same questions with right answers"


def test_the_report_is_whole(command: Command, study: Ended, found: dict[str, Any]) -> None:
    (folder,) = (command.storage / "fidelity").glob("planted-*")
    assert {path.name for path in folder.iterdir()} == {"fidelity.json", "fidelity.md", "fidelity.png"}
    assert f"Report: {folder / 'fidelity.md'}" in study.output
    matrix = found["modes"]["steps"]["matrix"]
    assert set(matrix["solvers"]) == {TRIVIAL} | {f"{s}, {form}" for s in SOLVERS for form in FORMS}
    assert 0 < matrix["attainable"]["pearson"]["halves"] < matrix["attainable"]["pearson"]["value"] <= 1
    best = matrix["solvers"]["exact, centred"]
    assert -1 <= best["pearson"]["low"] <= best["pearson"]["high"] <= 1
    assert best["pearson"]["value"] > 0.7
    client = MlflowClient(f"sqlite:///{command.storage}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "ideal"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["pearson/steps/matrix/exact-centred"] == pytest.approx(best["pearson"]["value"])
    assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {"fidelity.md", "fidelity.png"}


def test_a_second_study_trains_nothing(command: Command, found: dict[str, Any]) -> None:
    before = command.records()
    assert sum("retraining" in str(path) for path in before) == 4 * (1 + 2 * len(DOMAINS))
    again = command("fidelity")
    assert again.status == 0, again.output
    assert command.records() == before
    command.leaves_nothing_running()
