"""Benchmarks through the real lm-eval and reasoning-gym, answered by a model that is a function."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reasoning_gym
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ideal.benchmarks import code_eval, sandbox, task_code, tasks
from ideal.benchmarks.evaluation import Score, by_item, evaluate
from ideal.config.inputs import BenchmarkConfig
from ideal.errors import BadInput


class Function(LM):
    """A model that answers with a function of the prompt, and keeps what it was asked."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__()
        self.answer = answer
        self.asked: list[tuple[str, dict[str, Any]]] = []

    tokenizer_name = "none"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat_history) + "<assistant>"

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.asked += [request.args for request in requests]
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def scores(model: LM, *benchmarks: BenchmarkConfig, allow: bool = False) -> dict[str, Score]:
    return evaluate(model, benchmarks, allow_code_execution=allow, progress=lambda *_: None)


def fault(benchmark: BenchmarkConfig, *, allow: bool = False) -> BadInput:
    with pytest.raises(BadInput) as caught:
        tasks.check([benchmark], allow_code_execution=allow)
    return caught.value


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    """A task file over a JSONL file of its own. Strings that start with `!function` become that tag."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **settings,
    }
    text = json.dumps(task, indent=1)
    text = re.sub(r'"(!function [^"]*)"', r"\1", text)
    (folder / f"{name}.yaml").write_text(text)


ROWS = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(4)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    patterns = {"strict-match": "#### (.*)", "loose": "([0-9]+)"}
    filters = [
        {
            "name": name,
            "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}],
        }
        for name, pattern in patterns.items()
    ]
    write_task(tmp_path, "sums", ROWS, filter_list=filters)
    write_task(tmp_path, "one", ROWS[:1])
    write_task(tmp_path, "rest", ROWS[1:])
    group = {
        "group": "both",
        "task": ["one", "rest"],
        "aggregate_metric_list": [{"metric": "exact_match", "aggregation": "mean", "weight_by_size": True}],
    }
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    (tmp_path / "plain.yaml").write_text(json.dumps({"group": "plain", "task": ["one", "rest"]}))
    return tmp_path


def test_a_procedural_task_is_scored_by_reasoning_gyms_own_scorer() -> None:
    options = {"min_words": 3, "max_words": 6}
    benchmark = BenchmarkConfig(
        name="math", reasoning_gym="letter_counting", size=6, seed=7, options=options, max_new_tokens=9
    )
    made = reasoning_gym.create_dataset("letter_counting", size=6, seed=7, **options)
    answers = [entry["answer"] for entry in made]
    answers = [answers[0], f" {answers[1]}\n", answers[2] + " or so", "no", "", answers[5]]
    replies = dict(zip((f"<user>{entry['question']}<assistant>" for entry in made), answers, strict=True))
    model = Function(replies.__getitem__)

    score = scores(model, benchmark)["math"]

    wanted = [made.score_answer(answer.strip(), entry) for answer, entry in zip(answers, made, strict=True)]
    assert 0 < wanted[2] < 1
    assert score.value == pytest.approx(sum(wanted) / 6)
    assert (score.metric, score.items) == ("score,none", 6)
    assert score.stderr is not None
    assert score.stderr > 0
    assert all(settings["max_gen_toks"] == 9 for _, settings in model.asked)


def test_few_shot_examples_of_a_procedural_task_are_not_among_its_items() -> None:
    benchmark = BenchmarkConfig(name="math", reasoning_gym="chain_sum", size=3, seed=7, num_fewshot=2)
    model = Function(lambda _: "")
    scores(model, benchmark)
    made = [entry["question"] for entry in reasoning_gym.create_dataset("chain_sum", size=5, seed=7)]
    for (prompt, _), question in zip(model.asked, made[:3], strict=True):
        assert prompt.endswith(f"<user>{question}<assistant>")
        assert prompt.count("<user>") == 3
        assert all(f"<user>{example}" in prompt for example in made[3:])


def test_a_task_of_ones_own_takes_metric_limit_and_chat_from_the_config(folder: Path) -> None:
    model = Function(lambda prompt: "#### 1" if "What is 0" in prompt else "2")
    sums = {"task": "sums", "include": str(folder)}
    got = scores(
        model,
        BenchmarkConfig(name="default", **sums),
        BenchmarkConfig(name="loose", metric="exact_match,loose", **sums),
        BenchmarkConfig(name="short", metric="exact_match,strict-match", limit=1, chat=False, **sums),
    )
    assert got["default"].metric == "exact_match,strict-match"
    assert got["default"].value == 0.25
    assert got["loose"] == Score("exact_match,loose", 0.5, pytest.approx(0.289, abs=1e-3), 4)
    assert (got["short"].value, got["short"].items) == (1.0, 1)
    assert model.asked[0][0] == "<user>Question: What is 0 + 1?<assistant>"
    assert model.asked[-1][0] == "Question: What is 0 + 1?"


def test_progress_names_the_benchmark_and_passes_on_what_the_model_says(folder: Path) -> None:
    class Telling(Function):
        progress: Callable[[int, int], None] | None = None

        def generate_until(self, requests: list[Instance]) -> list[str]:
            assert self.progress
            self.progress(len(requests), len(requests))
            return super().generate_until(requests)

    seen: list[tuple[str, int, int]] = []
    evaluate(
        Telling(lambda _: "1"),
        [BenchmarkConfig(name=name, task=name, include=str(folder)) for name in ("one", "rest")],
        allow_code_execution=False,
        progress=lambda *state: seen.append(state),
    )
    assert seen == [("one", 0, 0), ("one", 1, 1), ("rest", 0, 0), ("rest", 3, 3)]


def test_a_group_is_one_benchmark(folder: Path) -> None:
    """`one` is solved and the three items of `rest` aren't: 1/4 weighted by size, 1/2 as a mean of tasks."""
    model = Function(lambda _: "1")
    got = scores(
        model,
        BenchmarkConfig(name="weighted", task="both", include=str(folder)),
        BenchmarkConfig(name="mean", task="plain", include=str(folder)),
    )
    assert (got["weighted"].value, got["weighted"].items) == (0.25, 4)
    assert (got["mean"].value, got["mean"].items) == (0.5, 4)


def test_scores_by_item_have_the_score_as_their_mean(folder: Path) -> None:
    """Items of a mean of tasks weigh as their tasks do; a metric with no mean over items has none."""
    model = Function(lambda prompt: "1" if "What is 0" in prompt else "no")
    sums = BenchmarkConfig(name="sums", task="sums", metric="exact_match,loose", include=str(folder))
    got = scores(
        model,
        sums,
        BenchmarkConfig(name="weighted", task="both", include=str(folder)),
        BenchmarkConfig(name="mean", task="plain", include=str(folder)),
        BenchmarkConfig(name="made", reasoning_gym="chain_sum", size=3, seed=7),
    )
    for score in got.values():
        assert score.by_item is not None
        assert len(score.by_item) == score.items
        assert np.mean(score.by_item) == pytest.approx(score.value)
    assert got["sums"].by_item == got["weighted"].by_item == [1, 0, 0, 0]
    assert got["mean"].by_item == [2, 0, 0, 0]
    assert by_item([[{"doc_id": 0, "filter": "none", "f1": (1, 0)}]], Score("f1,none", 1.0, None, 1)) is None
    assert by_item([[{"doc_id": 0, "filter": "none", "f1": 0.5}]], Score("f1,none", 1.0, None, 1)) is None


def test_documents_hold_the_prompt_and_its_fields_but_no_answers(folder: Path) -> None:
    loaded = tasks.load(
        [
            BenchmarkConfig(name="own", task="both", include=str(folder)),
            BenchmarkConfig(name="made", reasoning_gym="spell_backward", size=3, seed=1),
        ],
        allow_code_execution=False,
    )
    own = tasks.documents(loaded["own"])
    assert set(own) == {row["question"] for row in ROWS} | {f"Question: {row['question']}" for row in ROWS}
    made = reasoning_gym.create_dataset("spell_backward", size=3, seed=1)
    assert {entry["question"] for entry in made} == set(tasks.documents(loaded["made"]))


def test_faults_are_named_without_loading_data(folder: Path) -> None:
    for file in folder.glob("*.jsonl"):
        file.unlink()
    include = str(folder)
    tasks.check([BenchmarkConfig(name="b", task="both", include=include)], allow_code_execution=False)

    typo = fault(BenchmarkConfig(name="b", reasoning_gym="chain_sun", size=1))
    assert typo.where == "benchmarks.b.reasoning_gym"
    assert "chain_sum" in typo.remedy
    option = fault(BenchmarkConfig(name="b", reasoning_gym="chain_sum", size=1, options={"min_term": 1}))
    assert option.where == "benchmarks.b.options"
    assert "min_term" in option.what
    order = fault(
        BenchmarkConfig(name="b", reasoning_gym="chain_sum", size=1, options={"min_terms": 5, "max_terms": 2})
    )
    assert order.where == "benchmarks.b.options"
    nowhere = fault(BenchmarkConfig(name="b", task="sums", include=str(folder / "none")))
    assert nowhere.where == "benchmarks.b.include"
    metric = fault(BenchmarkConfig(name="b", task="sums", include=include, metric="exact_match,strict"))
    assert metric.where == "benchmarks.b.metric"
    with pytest.raises(BadInput, match=r"benchmarks\.b: its task can't be loaded"):
        tasks.load([BenchmarkConfig(name="b", task="sums", include=include)], allow_code_execution=False)


def test_the_papers_benchmarks_are_found_and_misspelt_ones_suggested(folder: Path) -> None:
    names = ["bbh_cot_fewshot", "gsm8k", "minerva_math", "ifeval", "truthfulqa_mc2", "arc_challenge"]
    tasks.check([BenchmarkConfig(name=name, task=name) for name in names], allow_code_execution=False)
    for name in ("humaneval", "mbpp"):
        refused = fault(BenchmarkConfig(name="b", task=name))
        assert refused.where == "benchmarks.b.task"
        assert "allow_code_execution" in refused.remedy
    assert "gsm8k" in fault(BenchmarkConfig(name="b", task="gsmk8")).remedy
    assert "sums" in fault(BenchmarkConfig(name="b", task="summs", include=str(folder))).remedy
    metric = fault(BenchmarkConfig(name="b", task="gsm8k", metric="exact_match,strict"))
    assert metric.where == "benchmarks.b.metric"


@pytest.fixture
def coding(tmp_path: Path) -> Path:
    problems = [
        {"prompt": f"def {name}(a, b):\n", "test": f"assert {name}(2, 3) == {result}"}
        for name, result in (("add", 5), ("times", 6))
    ]
    unsafe: dict[str, Any] = {"unsafe_code": True, "doc_to_text": "{{prompt}}", "doc_to_target": "{{test}}"}
    for module, metric in (("mbpp", "pass_at_1"), ("humaneval", "pass_at_k")):
        function = f"!function lm_eval.tasks.{module}.utils."
        entry = {"metric": function + metric, "aggregation": "mean", "higher_is_better": True}
        custom = {"function": "custom", "filter_fn": function + "build_predictions"}
        write_task(
            tmp_path,
            f"tiny_{module}",
            problems,
            **unsafe,
            metric_list=[{**entry, "k": [1]} if module == "humaneval" else entry],
            filter_list=[{"name": "code", "filter": [custom]}],
        )
    return tmp_path


def test_lm_evals_own_coding_tasks_run_in_the_sandbox(coding: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    inner = sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda program, limits: ran.append(program) or inner(program, limits))
    include = str(coding)
    whole = Function(
        lambda prompt: f"python\n{prompt.removeprefix('<user>').removesuffix('<assistant>')}  return a + b\n```"
    )
    body = Function(lambda _: "  return a + b\n")

    blocks = scores(whole, BenchmarkConfig(name="b", task="tiny_mbpp", include=include), allow=True)["b"]
    bodies = scores(body, BenchmarkConfig(name="b", task="tiny_humaneval", include=include), allow=True)["b"]

    assert (blocks.metric, blocks.value, blocks.items) == ("pass_at_1,code", 0.5, 2)
    assert (bodies.metric, bodies.value, bodies.items) == ("pass@1,code", 0.5, 2)
    assert len([program for program in ran if "times(2, 3) == 6" in program]) == 2


def test_code_is_refused_where_the_config_does_not_allow_it(coding: Path) -> None:
    benchmark = BenchmarkConfig(name="b", task="tiny_mbpp", include=str(coding))
    model = Function(lambda _: "")
    with pytest.raises(BadInput, match="allow_code_execution: true"):
        scores(model, benchmark)
    assert not model.asked


def test_pass_at_k_is_that_of_the_original_metric() -> None:
    """Two of three candidates pass: a pair drawn from them holds one that passes for certain."""
    good, bad = "def f(): return 1", "def f(): return 2"
    values, details = code_eval.CodeEval().compute(
        references=["assert f() == 1", "assert f() == 1"],
        predictions=[[good, bad, good], [bad, bad, good]],
        k=[1, 2, 5],
    )
    assert values == pytest.approx({"pass@1": (2 / 3 + 1 / 3) / 2, "pass@2": (1 + 2 / 3) / 2})
    assert [result["passed"] for _, result in details[0]] == [True, False, True]
    assert details[1][0][1]["result"] == "failed: AssertionError"


ATTACK = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
OWN = {
    "a file beside it": {"process_results": "!function mine.score"},
    "any module": {"process_results": "!function os.system"},
    "a class": {"class": "!function mine.Task"},
}


@pytest.mark.parametrize("brought", OWN.values(), ids=OWN)
def test_code_in_a_folder_of_tasks_needs_consent(tmp_path: Path, brought: dict[str, str]) -> None:
    """It isn't imported before it is asked for, in a file that the task's includes either."""
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    write_task(tmp_path, "base", ROWS, **brought)
    (tmp_path / "leaf.yaml").write_text("include: base.yaml\ntask: leaf\n")
    for task in ("base", "leaf"):
        benchmark = BenchmarkConfig(name="b", task=task, include=str(tmp_path))
        with pytest.raises(BadInput, match="brings code of its own") as problem:
            tasks.check([benchmark], allow_code_execution=False)
        assert problem.value.where == "benchmarks.b.include"
        tasks.check([benchmark], allow_code_execution=True)


def test_lm_evals_own_functions_need_none(tmp_path: Path) -> None:
    write_task(tmp_path, "base", ROWS, process_docs="!function lm_eval.tasks.hellaswag.utils.process_docs")
    tasks.check([BenchmarkConfig(name="b", task="base", include=str(tmp_path))], allow_code_execution=False)


@pytest.mark.parametrize("task", ["cruxeval_input", "score_prompt_robustness_math"])
def test_tasks_whose_code_runs_answers_outside_the_sandbox_are_refused(task: str) -> None:
    with pytest.raises(BadInput, match="outside the sandbox"):
        tasks.check([BenchmarkConfig(name="b", task=task)], allow_code_execution=True)


def test_such_code_cannot_be_borrowed(tmp_path: Path) -> None:
    write_task(tmp_path, "base", ROWS, process_results="!function lm_eval.tasks.cruxeval.utils.process_results_input")
    with pytest.raises(BadInput, match="outside the sandbox"):
        tasks.check([BenchmarkConfig(name="b", task="base", include=str(tmp_path))], allow_code_execution=True)


SAFE = {"metabench", "noreval/ask_gec", "humaneval", "humaneval_infilling", "mbpp"}


def test_no_other_task_of_lm_evals_runs_answers() -> None:
    """Whoever takes a newer lm-eval looks at what this names: code that evaluates text, or starts programs."""
    calls = {"exec", "eval", "parse_expr", "sympify", "Popen", "check_output", "system"}
    found = set()
    for file in task_code.TASKS.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in calls:
                    found.add(str(file.parent.relative_to(task_code.TASKS)))
    assert found <= SAFE | task_code.RUN_ANSWERS


def test_a_task_files_template_is_walled_in(tmp_path: Path) -> None:
    write_task(tmp_path, "base", ROWS, doc_to_text=ATTACK)
    with pytest.raises(BadInput, match="unsafe"):
        scores(Function(lambda _: ""), BenchmarkConfig(name="b", task="base", include=str(tmp_path)))
