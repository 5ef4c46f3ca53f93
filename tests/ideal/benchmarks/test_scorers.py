"""Answers that would run something, hang, or break their scorer: reasoning-gym's scorers evaluate some of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym

from ideal.benchmarks import procedural, sandbox
from ideal.benchmarks.scorers import Scorer, compares_text
from ideal.benchmarks.tasks import check
from ideal.config.inputs import BenchmarkConfig
from ideal.errors import BadInput

NEEDS_MORE = {"composite"}
"""Tasks that can't be made without options."""
EVALUATES = "string_insertion"
"""A task whose scorer gives any answer to ``eval``, and takes a list of the right answer's letters for 0.1."""


@pytest.fixture
def scorer() -> Iterator[Scorer]:
    made = Scorer(EVALUATES, size=2, seed=0, options={})
    yield made
    made.close()


def payloads(mark: Path) -> list[str]:
    """Answers that leave a mark where they are evaluated, by ``eval`` or by sympy's parser."""
    write = f"open({str(mark)!r}, 'w')"
    return [write, f"__import__('os').system('touch {mark}')", f"().__class__.__base__.__subclasses__() and {write}"]


def test_a_scorer_that_is_called_here_runs_nothing(tmp_path: Path) -> None:
    names = [name for name in procedural.names() if name not in NEEDS_MORE and compares_text(name)]
    assert {"gcd", "chain_sum", "spell_backward", "family_relationships", "products"} < set(names)
    for name in names:
        scorer = Scorer(name, size=1, seed=0, options={})
        for payload in payloads(tmp_path / "mark"):
            scorer(0, payload)
        assert list(tmp_path.iterdir()) == [], name


class WalledOff(Exception):
    """In place of the sandbox's start."""


def test_every_other_scorer_is_walled_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any) -> None:
        raise WalledOff

    monkeypatch.setattr(sandbox, "started", started)
    others = [name for name in procedural.names() if not compares_text(name)]
    evaluating = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion", "countdown", "puzzle24"}
    evaluating |= {"polynomial_multiplication", "simple_integration", "intermediate_integration"}
    assert evaluating | NEEDS_MORE < set(others)
    for name in evaluating:
        with pytest.raises(WalledOff):
            Scorer(name, size=1, seed=0, options={})(0, "1 + 1")


@pytest.mark.parametrize("name", [EVALUATES, "puzzle24"])
def test_an_answer_reaches_nothing_of_this_machine(name: str, tmp_path: Path) -> None:
    scorer = Scorer(name, size=1, seed=0, options={})
    made = reasoning_gym.create_dataset(name, size=1, seed=0)
    try:
        for payload in payloads(tmp_path / "mark"):
            scorer(0, payload)
        assert list(tmp_path.iterdir()) == []
        assert scorer(0, made[0]["answer"]) == made.score_answer(made[0]["answer"], made[0]) == 1
    finally:
        scorer.close()


def test_a_scorer_that_hangs_fails_on_its_answer_only(scorer: Scorer) -> None:
    scorer.task["cpu"] = 1
    right = scorer.entries[0]["answer"]
    assert scorer(0, "9**9**9**9") == 0
    assert scorer.failed == 1
    assert scorer(0, right) == 1
    assert scorer(0, str(list(right))) == 0.1, "the answer isn't evaluated any more"
    assert scorer.failed == 1


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os').kill(__import__('os').getppid(), 9)",
        "__import__('os').kill(-1, 9)",
        "__import__('os')._exit(0)",
        "[__import__('os').write(fd, b'1.0') for fd in range(3)] and 1 / 0",
    ],
)
def test_an_answer_that_attacks_its_scorer_gains_nothing(scorer: Scorer, answer: str) -> None:
    assert scorer(0, answer) == 0
    assert [scorer(item, entry["answer"]) for item, entry in enumerate(scorer.entries)] == [1, 1]


def test_the_entry_that_was_asked_is_scored(scorer: Scorer) -> None:
    """Not one that is made again: tasks go through sets, whose order is another in every process."""
    scorer.entries[0] = {**scorer.entries[0], "answer": "another"}
    assert scorer(0, "another") == 1


def test_a_scorer_that_raises_is_counted() -> None:
    scorer = Scorer("prime_factorization", size=1, seed=0, options={})
    with pytest.raises(ValueError, match="heads"):
        reasoning_gym.create_dataset("prime_factorization", size=1, seed=0).score_answer("heads", scorer.entries[0])
    try:
        assert scorer(0, "heads") == 0
        assert scorer.failed == 1
    finally:
        scorer.close()


def test_without_a_sandbox_such_a_benchmark_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def require() -> None:
        raise BadInput("allow_code_execution", "this machine can't wall off model-written code: no", "")

    monkeypatch.setattr(sandbox, "require", require)
    check([BenchmarkConfig(name="sums", reasoning_gym="chain_sum", size=1)], allow_code_execution=False)
    with pytest.raises(BadInput, match="walled off") as problem:
        check([BenchmarkConfig(name="letters", reasoning_gym=EVALUATES, size=1)], allow_code_execution=False)
    assert problem.value.where == "benchmarks.letters.reasoning_gym"


def test_a_scorer_that_does_not_start_is_no_score_of_0(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"purelib": "/nowhere", "platlib": "/nowhere"})
    with pytest.raises(RuntimeError, match="No module named 'reasoning_gym'"):
        scorer(0, scorer.entries[0]["answer"])
