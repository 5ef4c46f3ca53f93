"""What a comparison runs, and what it says of made-up outcomes."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from ideal.config.file import load
from ideal.errors import BadInput
from service.outcome import Outcome, Trials
from service.reports import compare_report
from service.runs.compare import rows, trials_of
from service.stages.benchmark import kept
from service.store.stage import Record

SCORES = {"joint": (0.2, 0.3, 0.4), "uniform": (0.3, 0.4, 0.5), "equilibrium": (0.1, 0.4, 0.4)}
ITEMS = np.array([-0.2, 0.0, 0.1, 0.1])
"""How much easier than the mean a benchmark's items are, for all."""


def test_every_method_runs_with_every_seed(path: Path) -> None:
    trials = trials_of(path, ["seed=3"], [], ["equilibrium.m=0.5 equilibrium.rule=paper"], 2)
    labels = ["joint", "base", "uniform", "leave_one_out", "specific math", "specific chat", "random", "doremi"]
    labels += ["doge", "merge", "regmix lightgbm", "regmix ridge", "equilibrium", "equilibrium m=0.5 rule=paper"]
    assert [trial.label for trial in trials] == [f"{label}, seed {seed}" for seed in (3, 4) for label in labels]
    assert {(t.config.seed, t.config.method, t.config.methods.domain) for t in trials} >= {
        (3, "joint", None),
        (4, "specific", "chat"),
    }
    last = trials[-1].config
    assert (last.method, last.equilibrium.m, last.equilibrium.rule) == ("equilibrium", 0.5, "paper")


def test_joint_is_always_there(path: Path) -> None:
    assert list(rows(load(path), ["doge", "equilibrium"], [])) == ["joint", "doge", "equilibrium"]


def test_what_cant_be_compared_is_refused(path: Path) -> None:
    with pytest.raises(BadInput, match="no 'bayes'"):
        trials_of(path, None, ["bayes"], [], 1)
    with pytest.raises(BadInput, match=r"m=0\.8 is the same as equilibrium"):
        trials_of(path, None, ["equilibrium"], ["equilibrium.m=0.8"], 1)


@pytest.fixture
def findings(path: Path, outcome: Outcome, tmp_path: Path) -> Trials:
    """Three seeds of three methods; only `equilibrium` has more than one iteration."""
    trials = trials_of(path, None, ["joint", "uniform", "equilibrium"], [], 3)
    outcomes = []
    for trial in trials:
        score = SCORES[trial.values["row"]][int(trial.values["seed"])]
        ours = trial.values["row"] == "equilibrium"
        iterations = [replace(each) for each in (outcome.iterations if ours else outcome.iterations[:1])]
        for number, iteration in enumerate(iterations):
            cells = {"sums": {"value": score, "stderr": 0.1}, "words": {"value": score + 0.2, "stderr": 0.1}}
            name = f"{trial.label} {number}"
            folder = tmp_path / name
            folder.mkdir()
            iteration.benchmark = Record("benchmark", "b", folder, cells, 2.0, fresh=True)
            iteration.scored = {}
            for benchmark, cell in cells.items():
                (folder / benchmark).mkdir()
                kept(folder / benchmark, {"by_item": (cell["value"] + ITEMS).tolist()})
                iteration.scored[benchmark] = Record("benchmark", "b", folder / benchmark, cell, 1.0, fresh=True)
            trained = {"tokens": 1000, "passes": 3000}
            iteration.sft = Record("sft", name, folder, trained, 10.0, fresh=True)
            losses = {domain: {"loss": 1.0, "tokens": 50, "passes": 200} for domain in iteration.volumes}
            iteration.reference = Record("reference", f"reference of {name}", folder, losses, 1.5, fresh=True)
            if iteration.influence:
                iteration.influence = replace(iteration.influence, result={"passes": 7000})
        if not ours:
            iterations[0].influence, iterations[0].method = None, trial.values["row"]
        outcomes.append(Outcome(outcome.data, iterations, "done"))
    return Trials(trials, outcomes, 9.0, set())


def test_differences_are_paired_by_seed(findings: Trials, tmp_path: Path) -> None:
    found = compare_report.summary(findings, "joint", "equilibrium")
    by_label = {row["label"]: row for row in found["rows"]}
    assert list(by_label) == list(SCORES)
    assert by_label["joint"]["overall"]["mean"] == pytest.approx(0.4)  # of the two benchmarks' 0.3 and 0.5
    assert by_label["joint"]["against"]["p"] == 1
    assert by_label["uniform"]["against"]["mean"] == pytest.approx(0.1)
    assert by_label["uniform"]["against"]["p_alone"] == 0.25, "each seed gains the same: three signs"
    assert by_label["uniform"]["against"]["p"] == 0.5, "of two that are compared"
    assert by_label["equilibrium"]["against"]["low"] < 0 < by_label["equilibrium"]["against"]["high"]
    assert (by_label["uniform"]["worst"], by_label["uniform"]["spread"]) == (pytest.approx(0.4), pytest.approx(0.2))


def test_intervals_know_of_items(findings: Trials) -> None:
    """Joint's three seeds differ by 0.1, its items by 0.14 within each of two benchmarks: both are in its interval."""
    found = compare_report.summary(findings, "joint", "equilibrium")
    (joint, *_) = found["rows"]
    of_items = float(ITEMS.var(ddof=1)) / 4 / 2
    variance = 0.01 / 3 + of_items
    freedom = variance**2 / ((0.01 / 3) ** 2 / 2 + 2 * (of_items / 2) ** 2 / 3)
    reach = variance**0.5 * stats.t.ppf(0.975, freedom)
    assert joint["overall"]["high"] - joint["overall"]["mean"] == pytest.approx(reach)
    assert found["without_items"] == []


def test_scores_without_items_are_named(findings: Trials, tmp_path: Path) -> None:
    for outcome in findings.outcomes:
        kept(outcome.equilibrium.scored["sums"].folder, {"by_item": None})
    found = compare_report.summary(findings, "joint", "equilibrium")
    assert found["without_items"] == ["sums"]
    assert "sums: no scores by item" in " ".join(compare_report.legend(found))


def test_ours_is_compared_with_every_other_row(findings: Trials, tmp_path: Path) -> None:
    found = compare_report.summary(findings, "joint", "equilibrium")
    assert [(duel["against"], duel["mean"]) for duel in found["duels"]] == [
        ("joint", pytest.approx(0.0)),
        ("uniform", pytest.approx(-0.1)),
    ]
    alone = {duel["against"]: duel["p_alone"] for duel in found["duels"]}
    adjusted = {duel["against"]: duel["p"] for duel in found["duels"]}
    assert adjusted["uniform"] == pytest.approx(2 * alone["uniform"])
    text = compare_report.write(tmp_path / "report", found).read_text()
    assert "| equilibrium against | overall | p (Holm) |" in text
    assert "| uniform | -0.100 [" in text
    without = Trials(findings.trials[:2], findings.outcomes[:2], 1.0, set())
    assert compare_report.summary(without, "joint", "equilibrium")["duels"] == []


def test_the_base_model_costs_nothing(findings: Trials) -> None:
    """It has a record of its own in an SFT's place, whose size and seconds are no method's."""
    for trial, outcome in zip(findings.trials, findings.outcomes, strict=True):
        if trial.values["row"] == "uniform":
            outcome.iterations[0].sft = Record("model", "m", Path("/nowhere"), {"bytes": 9}, 99.0, fresh=True)
    row = compare_report.summary(findings, "joint", "equilibrium")["rows"][1]
    assert row["search_share"] == 0
    assert row["runs"][0]["sft"] == {"passes": 0, "seconds": 0}


def test_the_search_is_all_but_the_final_sft_and_scores(findings: Trials) -> None:
    found = compare_report.summary(findings, "joint", "equilibrium")
    spent = {row["label"]: row["runs"][0]["search"] for row in found["rows"]}
    assert spent["joint"] == spent["uniform"] == {"passes": 0, "seconds": 0}
    # D0's and a rejected D1's SFT, three references of 400 passes that accepted or rejected, D0's influence
    assert spent["equilibrium"]["passes"] == 2 * 3000 + 3 * 400 + 7000
    assert spent["equilibrium"]["seconds"] == 2 * 10 + 3 * 1.5 + 1.5


def test_the_report_holds_every_method_and_every_run(findings: Trials, tmp_path: Path) -> None:
    found = compare_report.summary(findings, "joint", "equilibrium")
    text = compare_report.write(tmp_path / "report", found).read_text()
    assert "| uniform | 0.400 | 0.600 | 0.500 [0.305, 0.695] | +0.100 (+25.0%) | 0.5 |" in text
    assert "Means over 3 seeds" in text
    assert json.loads((tmp_path / "report" / "compare.json").read_text()) == found
    with (tmp_path / "report" / "runs.csv").open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == 9
    assert {(row["method"], row["seed"]) for row in read} == {(m, str(s)) for m in SCORES for s in range(3)}
    assert [float(row["sums"]) for row in read if row["method"] == "joint"] == list(SCORES["joint"])
    assert {row["sft_passes"] for row in read} == {"3000"}
    assert {row["search_passes"] for row in read if row["method"] == "equilibrium"} == {str(2 * 3000 + 3 * 400 + 7000)}
    for name in ("scores", "volumes"):
        assert (tmp_path / "report" / f"{name}.png").stat().st_size > 5000
    assert compare_report.metrics(found)["overall/uniform"] == pytest.approx(0.5)


@pytest.mark.parametrize(("width", "columns"), [(160, 11), (80, 6)])
def test_no_word_of_the_table_is_cut_off(findings: Trials, width: int, columns: int) -> None:
    found = compare_report.summary(findings, "joint", "equilibrium")
    console = Console(width=width, record=True, file=io.StringIO())
    shown = compare_report.table(found, width)
    console.print(shown)
    printed = console.export_text()
    assert len(shown.columns) == columns
    assert "…" not in printed
    assert "equilibrium" in printed


def test_one_seed_has_no_interval(findings: Trials, tmp_path: Path) -> None:
    kept = [n for n, trial in enumerate(findings.trials) if trial.values["seed"] == "0"]
    one = Trials([findings.trials[n] for n in kept], [findings.outcomes[n] for n in kept], 1.0, set())
    text = compare_report.write(tmp_path / "report", compare_report.summary(one, "joint", "equilibrium")).read_text()
    assert "| uniform | 0.300 | 0.500 | 0.400 | +0.100 (+33.3%) |  |" in text
    assert "Means over 1 seed;" in text
