"""The report shows every mixture that was trained, and everything that its data was rid of."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ideal.config.config import Config
from ideal.influence.table import InfluenceTable
from service.outcome import Outcome
from service.reports import report


def test_a_layer_that_needed_help_is_named(tmp_path: Path, config: Config, outcome: Outcome) -> None:
    assert outcome.iterations[0].influence
    result = outcome.iterations[0].influence.result
    result |= {"conditions": {"a.down": 10.0, "a.up": 3e7}, "repaired": {"a.down": 1e-4}}
    text = report.write(tmp_path, config, outcome).read_text()
    assert "largest condition number before damping 3.0e+07 (a.up)" in text
    assert "a.down was decomposed only with 0.0001 of its mean eigenvalue" in text
    result.clear()
    assert "D0: nothing to invert" in report.write(tmp_path, config, outcome).read_text()


def cells(outcome: Outcome) -> dict[str, dict[str, list[str]]]:
    return {heading: {row[0]: row[1:] for row in lines} for heading, lines in report.rows(outcome)}


def test_the_table_has_a_column_for_each_mixture(outcome: Outcome) -> None:
    found = cells(outcome)
    assert found["volume (examples)"] == {"math": ["12", "13", "13"], "chat": ["6", "5", "5"]}
    assert found["β, the next change"] == {"math": ["+0.150", "", ""], "chat": ["-0.300", "", ""]}
    assert found["reference loss (nats per token)"]["objective"] == ["1.6250", "1.5625", "1.5625"]
    assert found["reference loss (nats per token)"]["math"] == ["1.2500", "1.1250", "1.1250"]
    assert found["benchmark score"]["sums"] == ["0.250 ± 0.125", "0.500 ± 0.125", "0.500 ± 0.125"]


def test_influences_are_relative_with_their_interval_and_say_when_they_are_undecided(outcome: Outcome) -> None:
    found = cells(outcome)["influence of more, largest = 1"]
    assert found["math"][0] == "+1.00 [+0.20, +1.80]"
    assert found["chat"][0] == "-0.50 [-0.80, +0.60] undecided"


def test_a_run_without_a_score_or_an_influence_yet_has_a_table(outcome: Outcome) -> None:
    """`ideal sync` of a run that was killed after its first SFT."""
    first = outcome.iterations[0]
    first.benchmark = first.influence = first.table = first.update = None
    found = cells(Outcome(outcome.data, [first]))
    assert found["volume (examples)"]["math"] == ["12"]
    assert "benchmark score" not in found


@pytest.mark.parametrize("width", [80, 200])
def test_the_screens_table_holds_every_number(outcome: Outcome, width: int) -> None:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table(outcome))
    text = console.export_text()
    for word in ("D0", "D1", "rejected", "math", "chat", "sums", "1.6250", "0.500"):
        assert word in text


def test_the_report_says_how_it_ended_and_what_was_left_out(config: Config, outcome: Outcome, tmp_path: Path) -> None:
    path = report.write(tmp_path / "report", config, outcome)
    text = path.read_text()
    assert "all 1 iterations done" in text
    assert "Equilibrium: math 13, chat 5." in text
    assert "| math | train | 24 | 23 | 1 empty | 2 |" in text
    assert "a.jsonl:7: empty" in text
    assert "| sft | sft-of-0 | 1.5 |" in text
    for picture in ("volumes-and-scores", "influence-D0"):
        assert f"{picture}.png" in text
        assert (path.parent / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_the_json_holds_all_of_it_unrounded(config: Config, outcome: Outcome, tmp_path: Path) -> None:
    report.write(tmp_path / "report", config, outcome)
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found["equilibrium"] == {"math": 13, "chat": 5}
    assert [each["name"] for each in found["iterations"]] == ["D0", "D1 (rejected)", "D1"]
    assert found["iterations"][0]["update"]["beta"] == [0.15, -0.3]
    table = outcome.iterations[0].table
    assert table is not None
    assert found["iterations"][0]["influence"] == table.matrix().tolist()
    assert found["iterations"][1]["influence"] is None
    assert set(found["iterations"][0]["stages"]) == {"sft", "reference", "influence", "benchmark"}


def test_an_influence_of_nothing_is_no_division_by_nothing(config: Config, outcome: Outcome, tmp_path: Path) -> None:
    first = outcome.iterations[0]
    assert first.table is not None
    first.table.products[:] = 0
    update = first.update
    assert update is not None
    update.value[:] = [0.0, 0.0]
    report.write(tmp_path / "report", config, outcome)
    assert not any("nan" in cell for lines in cells(outcome).values() for row in lines.values() for cell in row)
    assert math.isfinite(json.loads((tmp_path / "report" / "report.json").read_text())["iterations"][0]["objective"])


def test_the_report_names_who_hurts_whom(config: Config, outcome: Outcome, tmp_path: Path) -> None:
    """Equal blocks, so no doubt: math helps chat, chat hurts math. The mixture is 12 and 6 examples of one length."""
    a = np.array([[1.0, 4.0], [-2.0, 1.0]])
    products = np.broadcast_to(100 * a[None, :, None, :, None], (1, 2, 4, 2, 4))
    tokens = np.full((2, 4), 10.0)
    outcome.iterations[0].table = InfluenceTable(np.array(products), tokens, tokens, np.ones(2), np.zeros((2, 2)))
    earlier = InfluenceTable(-np.array(products), tokens, tokens, np.ones(2), np.zeros((2, 2)))
    outcome.iterations.insert(0, replace(outcome.iterations[0], number=7, table=earlier))  # the last table counts
    text = report.write(tmp_path, config, outcome).read_text()
    assert "## Who helps and hurts whom\n\nAt D0:" in text
    assert "| math | helps | chat | +0.50 [+0.50, +0.50] |" in text
    assert "| chat | hurts | math | -1.00 [-1.00, -1.00] |" in text
    assert "Within the noise: 0 of 2 pairs." in text
    found = json.loads((tmp_path / "report.json").read_text())["pairs"]
    assert found["at"] == "D0"
    named = {(p["domain"], p["reference"]): (p["effect"], round(p["value"], 9)) for p in found["pairs"]}
    assert named == {("math", "chat"): ("helps", 0.5), ("chat", "math"): ("hurts", -1.0)}


def test_the_report_says_when_no_pair_is_beyond_noise(config: Config, outcome: Outcome, tmp_path: Path) -> None:
    text = report.write(tmp_path, config, outcome).read_text()
    assert "None of the 2 pairs is beyond noise." in text
    outcome.iterations[0].table = None
    assert "Who helps" not in report.write(tmp_path, config, outcome).read_text()
    assert json.loads((tmp_path / "report.json").read_text())["pairs"] is None
