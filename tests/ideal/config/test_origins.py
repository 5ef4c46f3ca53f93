"""A config that is printed with its origins is the same one, wherever it is read; the schema is that of its file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from ideal.config.config import Config
from ideal.config.file import load
from ideal.config.origins import AUTO, schema, with_origins
from tests.ideal.config.test_config import CONFIGS, sections, tree
from tests.ideal.config.test_settings import parts

SHIPPED = sorted(CONFIGS.glob("*.yaml"))
Tree = dict[str, Any]


def origins(text: str) -> dict[str, str]:
    """The origin of each value by its dotted place; elements of lists by their `name` or number."""
    found, lines = {}, text.splitlines()

    def walk(node: yaml.Node, place: str) -> None:
        if isinstance(node, yaml.MappingNode) and node.value:
            for key, value in node.value:
                walk(value, f"{place}.{key.value}" if place else key.value)
        elif isinstance(node, yaml.SequenceNode) and any(isinstance(each, yaml.MappingNode) for each in node.value):
            for number, each in enumerate(node.value):
                walk(each, f"{place}.{number}")
        else:
            found[place] = lines[node.end_mark.line][node.end_mark.column :].partition("# ")[2]

    walk(yaml.compose(text), "")
    return found


def written(folder: Path, made: Tree) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def again(folder: Path, text: str) -> Path:
    """The print as a config in another folder."""
    (folder / "else" / "where").mkdir(parents=True)
    path = folder / "else" / "where" / "printed.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("overrides", [[], ["sft.epochs=2", "domains.0.volume=9"]], ids=["plain", "set"])
def test_a_shipped_config_that_is_printed_is_the_same(path: Path, overrides: list[str], tmp_path: Path) -> None:
    text = with_origins(path, overrides)
    assert {origin.partition(";")[0] for origin in origins(text).values()} == {
        "default",
        "file",
        *(["--set"] if overrides else []),
    }
    printed = again(tmp_path, text)
    assert load(printed) == load(path, overrides)
    assert {origin.partition(";")[0] for origin in origins(with_origins(printed)).values()} == {"file"}


def test_each_value_has_its_origin(tmp_path: Path) -> None:
    made = tree(sft={"epochs": 2, "precision": "auto"}, influence={"layers": ["a", "b"]}, tracking={"uri": None})
    made["domains"][0]["train"]["options"] = {"min_terms": 2, "max_terms": 3}
    given = ["domains.code.volume=5", "domains.math.train.options.max_terms=4", "equilibrium={m: 0.3}"]
    found = origins(with_origins(written(tmp_path, made), [*given, "influence.layers.1=c", "sft.lora.rank=4"]))
    expected = {
        "name": "file",
        "seed": "default",
        "sft.epochs": "file",
        "sft.learning_rate": "default",
        "sft.precision": "file; the hardware decides when the run starts",
        "influence.precision": "default; the hardware decides when the run starts",
        "resources.shard": "default; derived from the memory when the run starts",
        "influence.layers": "--set",
        "equilibrium.m": "--set",
        "equilibrium.growth": "default",
        "sft.lora.rank": "--set",
        "sft.lora.alpha": "default",
        "domains.0.volume": "default",
        "domains.1.volume": "--set",
        "domains.0.train.options.min_terms": "file",
        "domains.0.train.options.max_terms": "--set",
        "domains.1.train.size": "file",
        "tracking.uri": "file",
        "fidelity.solvers.ekfac.damping": "default",
    }
    assert {place: found[place] for place in expected} == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "yes",
        "1e3",
        "null",
        "~",
        "a: b",
        "a #b",
        "- a",
        "two\nlines\n",
        "\ttab",
        "é 😀",
        "\u2028",
        "\x85",
        "\ud800",
    ],
    ids=ascii,
)
def test_any_text_is_printed_as_it_was(text: str, tmp_path: Path) -> None:
    made = tree()
    made["domains"][0]["train"] |= {"system": text, "options": {"a": {text: [text, {"b": [1.5e-7, None, True]}]}}}
    path = written(tmp_path, made)
    assert load(path).domains[0].train.system == text
    assert load(again(tmp_path, with_origins(path))) == load(path)


def test_paths_lead_where_they_led(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"files": ["data/a.jsonl"]}
    made = tree(model={"source": "made", "made": {"corpus": [source]}, "chat_template": "t.jinja"}, storage="$STORE/x")
    made["domains"][0]["train"] = source
    made["benchmarks"][0]["include"] = "../tasks"
    monkeypatch.setenv("STORE", str(tmp_path / "store"))
    path = written(tmp_path / "project", made)
    config = load(again(tmp_path, with_origins(path)))
    assert config == load(path)
    assert config.model.made
    here = [str(path.parent / "data/a.jsonl")]
    assert config.domains[0].train.files == config.model.made.corpus[0].files == here
    assert config.model.chat_template == str(path.parent / "t.jinja")
    assert config.benchmarks[0].include == str(tmp_path / "tasks")
    assert config.root == tmp_path / "store" / "x"


def test_all_that_can_be_auto_says_what_decides_it() -> None:
    automatic = {
        name
        for section in sections(Config)
        for name, field in section.model_fields.items()
        if "auto" in parts(field.annotation)
    }
    assert automatic == set(AUTO)


# --- The schema ---


def test_the_schema_is_one() -> None:
    assert schema()["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_fits_the_schema(path: Path) -> None:
    validator = Draft202012Validator(schema())
    assert not [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))]
    assert not [error.message for error in validator.iter_errors(yaml.safe_load(with_origins(path)))]


@pytest.mark.parametrize(
    "wrong", [{"sed": 1}, {"sft": {"epochs": 0}}, {"method": "bayes"}, {"influence": {"layers": "x"}}], ids=str
)
def test_a_mistake_does_not_fit_it(wrong: Tree) -> None:
    validator = Draft202012Validator(schema())
    assert validator.is_valid(tree())
    assert not validator.is_valid(tree(**wrong))


def properties(node: Any) -> Iterator[tuple[str, Tree]]:
    if isinstance(node, dict):
        yield from node.get("properties", {}).items()
    for each in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
        yield from properties(each)


def test_an_editor_can_show_what_each_setting_is() -> None:
    found = list(properties(schema()))
    assert {"learning_rate", "files", "sft", "damping", "rows"} <= {name for name, _ in found}
    assert not [name for name, described in found if not described.get("description")]
