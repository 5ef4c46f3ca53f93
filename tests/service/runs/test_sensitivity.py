"""``ideal sensitivity`` reads a run's records and leaves its findings beside the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ideal.config.config import Config
from ideal.equilibrium import update
from ideal.errors import BadInput
from service.outcome import Outcome
from service.runs import sensitivity
from service.store.names import run_folder
from tests.service.conftest import iteration


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch, outcome: Outcome) -> None:
    """The run is the fixture's: D0, a D1 that was rejected, and D1. Few draws are enough."""
    monkeypatch.setattr("service.runs.run.replay", lambda config, notice: outcome)
    monkeypatch.setattr(sensitivity, "DRAWS", 20)


def quiet() -> Console:
    return Console(width=200, record=True, file=open("/dev/null", "w"))


def test_it_prints_a_table_and_writes_beside_the_report(config: Config) -> None:
    console = quiet()
    path = sensitivity.examine(config, console)
    assert path == run_folder(config) / "sensitivity.md"
    shown, text = console.export_text(), path.read_text()
    for words in ("the whole reference set", "drawn again", "math counts twice", "chat counts half", "without chat"):
        assert words in shown
        assert words in text
    assert "Sensitivity: " in shown
    assert "## D0, m = 0.15" in text
    assert "## D1" not in text, "no influence follows it"
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1, "every row has every column"


def test_the_json_holds_the_runs_own_update_first(config: Config, outcome: Outcome) -> None:
    first = outcome.iterations[0]
    assert first.table is not None
    sensitivity.examine(config, quiet())
    (found,) = json.loads((run_folder(config) / "sensitivity.json").read_text())["iterations"]
    whole, drawn = found["scenarios"][:2]
    a = first.table.matrix().mean(1)
    expected = update(a, a[None], np.zeros(2), [12, 6], [23, 23], [5.0, 5.0], config.equilibrium, 0.15, 0.9)
    assert (found["name"], found["m"], found["domains"]) == ("D0", 0.15, ["math", "chat"])
    assert whole["beta"]["mean"] == pytest.approx(expected.beta)
    assert whole["volumes"]["mean"] == expected.volumes
    assert (whole["draws"], drawn["draws"]) == (1, 20)
    assert drawn["beta"]["low"][0] < drawn["beta"]["high"][0]
    assert whole["cosine"] == {"mean": pytest.approx(1), "low": pytest.approx(1), "high": pytest.approx(1)}


def test_the_step_is_the_one_that_was_taken(config: Config, outcome: Outcome, tmp_path: Path) -> None:
    """D1 was rejected with m = 0.4 and taken with 0.2; D1's own update starts from there."""
    first, rejected, second = outcome.iterations
    rejected.m, second.m = 0.4, 0.2
    assert sensitivity.step_size(config, outcome, first) == 0.2
    assert sensitivity.step_size(config, outcome, second) == 0.2
    assert sensitivity.step_size(config, Outcome(outcome.data, [first, rejected]), first) == config.equilibrium.m
    outcome.iterations[2] = iteration(tmp_path / "with", 1)
    outcome.iterations[2].m = 0.2
    assert [(f.name, f.m) for f in sensitivity.findings(config, outcome)] == [("D0", 0.2), ("D1", 0.2)]


def test_a_run_without_an_influence_yet_is_bad_input(config: Config, outcome: Outcome) -> None:
    outcome.iterations[0].table = None
    with pytest.raises(BadInput, match="run it first"):
        sensitivity.examine(config, quiet())
    assert not run_folder(config).exists()
