"""A config is checked whole before anything starts, and its errors name the field."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from ideal.config.config import Config
from ideal.config.file import load, parse
from ideal.config.inputs import Section
from ideal.errors import BadInput

CONFIGS = Path(__file__).parents[3] / "jobs" / "configs"


def tree(**more: Any) -> dict[str, Any]:
    def made(task: str, seed: int) -> dict[str, Any]:
        return {"reasoning_gym": task, "size": 10, "seed": seed}

    domains = [
        {"name": n, "train": made(t, 0), "reference": made(t, 100)} for n, t in (("math", "chain_sum"), ("code", "ab"))
    ]
    return {"name": "run", "domains": domains, "benchmarks": [{"name": "b", "task": "gsm8k"}], **more}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree()))
    return path


def refused(made: dict[str, Any], *expected: str) -> None:
    with pytest.raises(BadInput) as raised:
        parse(made, "c.yaml", Path("/"))
    for words in expected:
        assert words in str(raised.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_that_is_shipped_holds(path: Path) -> None:
    load(path)


def test_a_mistyped_key_gets_a_suggestion_with_its_path() -> None:
    refused(tree(sft={"learning_rat": 1e-5}), "sft.learning_rat: unknown key; did you mean `learning_rate`?")
    made = tree()
    made["domains"][1]["train"]["sizes"] = 3
    refused(made, "domains.1.train.sizes: unknown key; did you mean `size`?")
    refused(tree(tracking={"zzz": 1}), "tracking.zzz: unknown key; known here: uri, experiment")


def test_all_faults_are_named_at_once() -> None:
    refused(tree(sed=1, equilibrium={"m": 2, "rule": "best"}), "sed: unknown", "equilibrium.m:", "equilibrium.rule:")


def test_the_reference_solver_is_the_fidelity_studys_alone() -> None:
    refused(tree(influence={"solver": "exact"}), "influence.solver: `exact`", "fidelity.solvers", "take `kfac`")
    found = parse(tree(fidelity={"solvers": {"right": {"solver": "exact"}}}), "c.yaml", Path("/"))
    right = found.compared("right")
    assert right.solver == "exact"
    assert {"products", "residual"} <= set(right.of_the_table()), "which no other solver knows"
    assert not {"products", "residual"} & set(found.influence.of_the_table())


@pytest.mark.parametrize("m", [0, 1, -0.1, 1.5, "nan", "much"])
def test_m_outside_0_and_1(m: Any) -> None:
    refused(tree(equilibrium={"m": float("nan") if m == "nan" else m}), "equilibrium.m:")


def test_overrides(file: Path) -> None:
    overrides = ["equilibrium.m=0.3", "domains.code.train.size=7", "domains.0.volume=5", "sft.precision=fp32", "seed=3"]
    config = load(file, [*overrides, "influence.layers=['*.mlp.*', '*.o_proj']", "tracking.uri=http://x:1/?a=b"])
    assert (config.equilibrium.m, config.sft.precision, config.seed) == (0.3, "fp32", 3)
    assert (config.domains[1].train.size, config.domains[0].volume) == (7, 5)
    assert config.influence.layers == ["*.mlp.*", "*.o_proj"]
    assert config.tracking.uri == "http://x:1/?a=b"


@pytest.mark.parametrize(
    "override", ["m", "=3", "domains.law.volume=3", "domains.7.volume=3", "name.x=3", "seed=[", "domains.math.sise=3"]
)
def test_overrides_that_name_nothing(file: Path, override: str) -> None:
    with pytest.raises(BadInput, match=r"did you mean `size`|--set|unknown key"):
        load(file, [override])


def test_paths_of_a_made_models_corpus_are_taken_from_there_too(file: Path) -> None:
    made = tree(model={"source": "made", "made": {"corpus": [{"files": ["data/c.jsonl"]}]}})
    file.write_text(yaml.safe_dump(made))
    model = load(file).model
    assert model.made
    assert model.made.corpus[0].files == [str(file.parent / "data/c.jsonl")]


def test_an_override_changes_one_of_the_values_that_an_alias_repeats(file: Path) -> None:
    made = tree()
    shared = {"min_terms": 2}
    made["domains"][0]["train"]["options"] = made["domains"][0]["reference"]["options"] = shared
    file.write_text(yaml.safe_dump(made))
    assert "*id" in file.read_text()
    math = load(file, ["domains.math.train.options.min_terms=4"]).domains[0]
    assert (math.train.options, math.reference.options) == ({"min_terms": 4}, shared)


def sections(section: type[Section]) -> set[type[Section]]:
    found = {section}
    for field in section.model_fields.values():
        for part in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, Section):
                found |= sections(part)
    return found


def test_every_field_is_documented() -> None:
    assert len(sections(Config)) == 14
    for section in sections(Config):
        assert section.__doc__
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


@pytest.mark.parametrize(("seed", "holds"), [(0, False), (9, False), (10, True), (91, False), (90, True), (110, True)])
def test_generated_sets_share_no_items(seed: int, holds: bool) -> None:
    """Item i of a set is made from seed + i: neighbouring seeds give nearly the same set."""
    made = tree(benchmarks=[{"name": "b", "reasoning_gym": "chain_sum", "size": 10, "seed": seed}])
    if holds:
        parse(made, "c.yaml", Path("/"))
    else:
        refused(made, "benchmarks.b", "domains.math", "chain_sum")


def test_generated_few_shot_examples_count_too() -> None:
    few = {"name": "b", "reasoning_gym": "chain_sum", "size": 10, "seed": 90, "num_fewshot": 1}
    refused(tree(benchmarks=[few]), "benchmarks.b and domains.math.reference")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({}, "exactly one of"),
        ({"files": ["a.jsonl"], "hub": "a/b"}, "exactly one of"),
        ({"reasoning_gym": "chain_sum"}, "needs `size`"),
        ({"files": ["a.jsonl"], "options": {"a": 1}}, "`options` belongs"),
        ({"files": ["a.jsonl"], "rows": [5, 5]}, "0 <= start < stop"),
    ],
)
def test_sources_that_make_no_sense(source: dict[str, Any], problem: str) -> None:
    made = tree()
    made["domains"][0]["train"] = source
    refused(made, "domains.0.train: ", problem)


def test_names_stand_once_and_blocks_are_not_empty() -> None:
    made = tree()
    made["domains"][1]["name"] = "math"
    refused(made, "domains: the name 'math' stands twice")
    refused(tree(influence={"examples": 4, "blocks": 8}), "influence: ", "at least `blocks`")
    refused(tree(domains=tree()["domains"][:1]), "domains: ")


def test_a_method_that_cant_work_is_refused() -> None:
    refused(tree(method="specific"), "`method: specific` needs methods.domain")
    refused(tree(methods={"domain": "cooking"}), "there is no domain 'cooking'; there are math, code")
    refused(tree(method="doge", sft={"batch_examples": 1}), "sft.batch_examples of 2, one for each domain")
    refused(tree(method="bayes"), "method:")


def test_relative_paths_are_taken_from_the_configs_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tree(model={"source": "./m", "chat_template": "t.jinja"})
    made["domains"][0]["train"] = {"files": ["data/*.jsonl", "/abs/x.json"]}
    made["benchmarks"][0]["include"] = "../tasks"
    file.write_text(yaml.safe_dump(made))
    monkeypatch.chdir(file.parent.parent)
    config = load(Path(file.parent.name) / file.name)
    assert config.domains[0].train.files == [str(file.parent / "data/*.jsonl"), "/abs/x.json"]
    assert config.benchmarks[0].include == str(file.parent.parent / "tasks")
    assert config.model.source == str(file.parent / "m")
    assert config.model.chat_template == str(file.parent / "t.jinja")
    assert load(file, ["model.source=org/model"]).model.source == "org/model"


@pytest.mark.parametrize(("text", "problem"), [("a: [", "is not YAML"), ("", "no settings"), ("- 1", "no settings")])
def test_files_that_are_no_config(file: Path, text: str, problem: str) -> None:
    file.write_text(text)
    with pytest.raises(BadInput, match=f"config.yaml: .*{problem}"):
        load(file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none.yaml: can't be read"):
        load(tmp_path / "none.yaml")
    with pytest.raises(BadInput, match="can't be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"seed": 2**64}, "seed: more than 1,000,000,000"),
        ({"sft": {"epochs": 1e300}}, "sft.epochs"),
        ({"influence": {"layers": []}}, "influence.layers"),
        ({"influence": {"examples": 2**31}}, "examples: more than"),
        ({"storage": "~nobody-of-that-name/x"}, "storage: "),
        ({"storage": "/dev/null"}, "/dev/null is no folder"),
    ],
)
def test_what_nothing_can_be_done_with_is_refused(section: dict[str, Any], words: str) -> None:
    refused(tree(**section), words)
