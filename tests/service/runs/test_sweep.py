"""The grid of a sweep, and what is said of its trials, on made-up outcomes."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue

import pytest
from rich.console import Console

from ideal.errors import BadInput
from service.cluster.cluster import Cluster
from service.cluster.failures import StageFailed
from service.outcome import Outcome, Trials, sweep_key
from service.reports import sweep_report
from service.runs import sweep
from service.runs.sweep import grid
from service.stages.reference import BY_EXAMPLE


def test_every_combination_is_a_trial(path: Path) -> None:
    trials = grid(path, ["sft.epochs=2"], {"equilibrium.m": ["0.1", "0.2"], "seed": ["0", "1"]})
    assert [t.label for t in trials] == ["m=0.1, seed=0", "m=0.1, seed=1", "m=0.2, seed=0", "m=0.2, seed=1"]
    assert [(t.config.equilibrium.m, t.config.seed) for t in trials] == [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]
    assert {t.config.sft.epochs for t in trials} == {2}
    assert sweep_key(trials) == sweep_key(trials[::-1]) != sweep_key(trials[1:])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "nothing to sweep over"),
        ({"equilibrium.m": []}, "nothing to sweep over"),
        ({"equilibrium.m": ["0.2", "0.20"]}, "is the same run as m=0.2"),
        ({"equilibrium.m": ["0.2", "much"]}, "equilibrium.m"),
        ({"equilibrium.n": ["1"]}, "unknown key"),
    ],
)
def test_a_grid_that_does_not_hold_is_refused(path: Path, values: dict[str, list[str]], words: str) -> None:
    with pytest.raises(BadInput) as problem:
        grid(path, None, values)
    assert words in str(problem.value)


@pytest.fixture
def findings(path: Path, outcome: Outcome) -> Trials:
    """Two seeds of two values; the second value's losses are lower on every example."""
    trials = grid(path, None, {"equilibrium.m": ["0.1", "0.2"], "seed": ["0", "1"]})
    outcomes = []
    for number, _ in enumerate(trials):
        made = Outcome(outcome.data, outcome.iterations[:1], "all 1 iterations done")
        folder = path.parent / str(number)
        folder.mkdir()
        lower = 0.5 if number >= 2 else 1.0
        (folder / BY_EXAMPLE).write_text(json.dumps({"math": [[lower, 2 * lower], [1, 2]], "chat": [[lower], [1]]}))
        first = made.iterations[0]
        reference = type(first.reference)(**{**vars(first.reference), "folder": folder})
        made.iterations = [type(first)(**{**vars(first), "reference": reference})]
        outcomes.append(made)
    return Trials(trials, outcomes, 9.0, {outcome.data.folder})


def test_seeds_are_repeats_and_the_lower_loss_is_best(findings: Trials, tmp_path: Path) -> None:
    found = sweep_report.summary(findings)
    assert [(s["label"], s["loss"], s["chance"]) for s in found["settings"]] == [
        ("m=0.1", 1.0, 0.0),
        ("m=0.2", 0.5, 1.0),
    ]
    assert found["best"] == "m=0.2"
    assert found["best_between"] == (0.2, 0.2)
    per_run = len(findings.outcomes[0].records)
    assert found["cost"]["apart"] == 4 * per_run
    assert found["cost"]["stages"] == 4 + per_run - 1, "the reference losses are each trial's own"
    assert found["cost"]["fresh"] == found["cost"]["stages"] - 1
    text = sweep_report.write(tmp_path / "report", found).read_text()
    assert "Best on the reference sets: m=0.2, in 100% of resamples" in text
    assert (tmp_path / "report" / "sweep.png").exists()
    assert json.loads((tmp_path / "report" / "sweep.json").read_text())["best"] == "m=0.2"


def test_a_trial_that_was_stopped_says_so(findings: Trials) -> None:
    findings.outcomes[0].stopped = ""
    assert sweep_report.summary(findings)["trials"][0]["stopped"] == "stopped at D0: behind the others"


def test_trials_that_tune_left_unfinished_are_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Tune says: what counts is what is recorded, and of these nothing is, not even a first mixture."""
    trials = grid(path, None, {"equilibrium.m": ["0.1", "0.2"]})
    nothing = nullcontext(Cluster(cpus=1, gpus=0, nodes=1, sft_workers=1, sft_cpus=1, influence_workers=1))
    monkeypatch.setattr(sweep, "connected", lambda *_: nothing)
    monkeypatch.setattr(sweep, "Queue", lambda **_: SimpleQueue())
    monkeypatch.setattr(sweep, "_tune", lambda *_: [])
    with pytest.raises(StageFailed, match=r"2 of 2 trials aren't at their end: m=0\.1; m=0\.2"):
        sweep.run_trials(trials, Console(), concurrent=1, stop_behind=False)


def test_an_outcome_without_a_mixture_says_so(outcome: Outcome) -> None:
    empty = Outcome(outcome.data)
    assert not empty.accepted
    for asked in ("equilibrium", "search"):
        with pytest.raises(BadInput, match="none is trained yet"):
            getattr(empty, asked)


def test_other_reference_sets_are_not_compared(findings: Trials) -> None:
    other = findings.outcomes[3].equilibrium.reference.folder / BY_EXAMPLE
    other.write_text(json.dumps({"math": [[1.0], [3]], "chat": [[1.0], [1]]}))
    found = sweep_report.summary(findings)
    assert "best" not in found
    assert "can't be compared" in sweep_report.conclusion(found)[0]
    assert len(sweep_report._rows(found)) == 2
