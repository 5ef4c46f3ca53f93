"""What a comparison runs, and what it says of made-up outcomes."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ideal.comparison import difference, estimate
from ideal.config_file import load
from ideal.errors import BadInput
from service import compare_report
from service.compare import rows, trials_of
from service.mixtures import Outcome
from service.stages import Record
from service.sweep import Findings

SCORES = {"joint": (0.2, 0.3, 0.4), "uniform": (0.3, 0.4, 0.5), "equilibrium": (0.1, 0.4, 0.4)}


def test_every_method_runs_with_every_seed(path: Path) -> None:
    trials = trials_of(path, ["seed=3"], [], ["equilibrium.m=0.5 equilibrium.rule=paper"], 2)
    labels = ["joint", "uniform", "specific math", "specific chat", "random", "doremi", "doge", "merge", "regmix"]
    labels += ["equilibrium", "equilibrium m=0.5 rule=paper"]
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
def findings(path: Path, outcome: Outcome) -> Findings:
    """Three seeds of three methods; only `equilibrium` has more than one iteration."""
    trials = trials_of(path, None, ["joint", "uniform", "equilibrium"], [], 3)
    outcomes = []
    for trial in trials:
        score = SCORES[trial.values["row"]][int(trial.values["seed"])]
        ours = trial.values["row"] == "equilibrium"
        iterations = [replace(each) for each in (outcome.iterations if ours else outcome.iterations[:1])]
        for iteration in iterations:
            cells = {"sums": {"value": score, "stderr": 0.1}, "words": {"value": score + 0.2, "stderr": 0.1}}
            iteration.benchmark = Record("benchmark", "b", path.parent, cells, 2.0, fresh=True)
            iteration.sft = replace(iteration.sft, result={"tokens": 1000}, seconds=10.0)
        if not ours:
            iterations[0].influence, iterations[0].method = None, trial.values["row"]
        outcomes.append(Outcome(outcome.data, iterations, "done"))
    return Findings(trials, outcomes, 9.0, set())


def test_differences_are_paired_by_seed(findings: Findings, tmp_path: Path) -> None:
    found = compare_report.summary(findings, "joint")
    by_label = {row["label"]: row for row in found["rows"]}
    assert list(by_label) == list(SCORES)
    assert by_label["joint"]["overall"]["mean"] == pytest.approx(0.4)  # of the two benchmarks' 0.3 and 0.5
    assert by_label["joint"]["against"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    assert by_label["uniform"]["against"]["mean"] == pytest.approx(0.1)
    assert by_label["uniform"]["against"]["low"] == pytest.approx(0.1), "each seed gains the same"
    assert by_label["equilibrium"]["against"]["low"] < 0 < by_label["equilibrium"]["against"]["high"]
    assert (by_label["uniform"]["worst"], by_label["uniform"]["spread"]) == (pytest.approx(0.4), pytest.approx(0.2))


def test_the_search_is_all_but_the_final_sft_and_scores(findings: Findings) -> None:
    found = compare_report.summary(findings, "joint")
    spent = {row["label"]: row["runs"][0]["search"] for row in found["rows"]}
    assert spent["joint"] == spent["uniform"] == {"tokens": 0, "seconds": 0}
    # D0's and a rejected D1's SFT, their references of 100 tokens, D0's influence
    assert spent["equilibrium"]["tokens"] == 2 * 1000 + 2 * 100
    assert spent["equilibrium"]["seconds"] == 2 * 10 + 2 * 1.5 + 1.5


def test_the_report_holds_every_method_and_every_run(findings: Findings, tmp_path: Path) -> None:
    found = compare_report.summary(findings, "joint")
    text = compare_report.write(tmp_path / "report", found).read_text()
    assert "| uniform | 0.400 | 0.600 | 0.500 [0.252, 0.748] | +0.100 [+0.100, +0.100] (+25.0%) |" in text
    assert "Means over 3 seeds" in text
    assert json.loads((tmp_path / "report" / "compare.json").read_text()) == found
    with (tmp_path / "report" / "runs.csv").open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == 9
    assert {(row["method"], row["seed"]) for row in read} == {(m, str(s)) for m in SCORES for s in range(3)}
    assert [float(row["sums"]) for row in read if row["method"] == "joint"] == list(SCORES["joint"])
    for name in ("scores", "volumes"):
        assert (tmp_path / "report" / f"{name}.png").stat().st_size > 5000
    assert compare_report.metrics(found)["overall/uniform"] == pytest.approx(0.5)


@pytest.mark.parametrize(("width", "columns"), [(160, 11), (80, 6)])
def test_no_word_of_the_table_is_cut_off(findings: Findings, width: int, columns: int) -> None:
    found = compare_report.summary(findings, "joint")
    console = Console(width=width, record=True, file=io.StringIO())
    shown = compare_report.table(found, width)
    console.print(shown)
    printed = console.export_text()
    assert len(shown.columns) == columns
    assert "…" not in printed
    assert "equilibrium" in printed


def test_one_seed_has_no_interval(findings: Findings, tmp_path: Path) -> None:
    kept = [n for n, trial in enumerate(findings.trials) if trial.values["seed"] == "0"]
    one = Findings([findings.trials[n] for n in kept], [findings.outcomes[n] for n in kept], 1.0, set())
    text = compare_report.write(tmp_path / "report", compare_report.summary(one, "joint")).read_text()
    assert "| uniform | 0.300 | 0.500 | 0.400 | +0.100 (+33.3%) |  |" in text
    assert "Means over 1 seed;" in text


def test_students_t_by_hand() -> None:
    # three values 1, 2, 3: deviation 1, error 1/√3, t(97.5 %, 2) = 4.3027
    found = estimate([1, 2, 3], 0.95)
    assert (found.mean, found.high - 2) == (2, pytest.approx(4.30265 / math.sqrt(3), rel=1e-4))
    apart = difference([2, 4, 6], [1, 2, 3], 0.95)
    assert apart.p == pytest.approx(0.0742, abs=1e-4)  # t = 3.4641 with 2 degrees of freedom
    assert difference([1.0], [0.5], 0.95).p == 1
