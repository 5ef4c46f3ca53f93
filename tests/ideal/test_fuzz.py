"""Whatever a user writes into a config or a data file: it is taken, or there is one error that names the place.

Never a traceback: the only exceptions are `BadInput`, and `Unusable` of a single row, which is counted and reported.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ideal.config.config import Config
from ideal.config.file import load, parse
from ideal.config.inputs import Source
from ideal.data.chat import ChatEncoder, Unusable
from ideal.data.sources import messages, rows
from ideal.errors import BadInput
from ideal.model.base import load_tokenizer
from tests.tiny import make_model

VALID = yaml.safe_load((Path(__file__).parents[2] / "jobs" / "configs" / "quickstart.yaml").read_text())
EACH = int(os.environ.get("FUZZ_CASES", "1250"))
"""Cases of each of the four tests."""
LETTERS = st.characters(codec=None)  # halves of characters, too

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(LETTERS, max_size=20),
    st.sampled_from(
        ["schedule", "math", "*", "../x", "~nobody/x", "$HOME", "file:///x", 2**64, -(2**63), 10**400, 1e300]
    ),
)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
)
quiet = settings(
    max_examples=EACH,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def said(error: BadInput | Unusable) -> None:
    """It names the place, and what is wrong there; a row's place is beside it."""
    assert str(error).strip()
    if isinstance(error, BadInput):
        assert error.where.strip()
        assert error.what.strip()


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a tree."""
    steps = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else []
    return [at] * bool(at) + [place for step, value in steps for place in places(value, (*at, step))]


def changed(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy with one value replaced."""
    if not place:
        return value
    copy: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[place[0]] = changed(tree[place[0]], place[1:], value)
    return copy


def sections() -> list[tuple[str, str]]:
    """(section, field) of every setting, those that the quickstart leaves out included."""
    parts = {name: field.annotation for name, field in Config.model_fields.items()}
    return [(name, each) for name, kind in parts.items() for each in getattr(kind, "model_fields", {})]


@quiet
@given(st.sampled_from(places(VALID)), trees)
def test_a_config_with_anything_anywhere(place: tuple[Any, ...], value: Any) -> None:
    try:
        found = parse(changed(VALID, place, value), "fuzz", Path("/nowhere"))
    except BadInput as problem:
        said(problem)
    else:
        assert parse(yaml.safe_load(yaml.safe_dump(found.model_dump(mode="json"))), "again", Path("/nowhere")) == found


@quiet
@given(st.sampled_from(sections()), trees)
def test_a_config_with_anything_in_any_field(field: tuple[str, str], value: Any) -> None:
    section, name = field
    tree = VALID | {section: {**(VALID.get(section) or {}), name: value}}
    try:
        parse(tree, "fuzz", Path("/nowhere"))
    except BadInput as problem:
        said(problem)


@quiet
@given(st.one_of(st.binary(max_size=200), trees.map(lambda tree: yaml.safe_dump(tree, allow_unicode=True).encode())))
def test_a_config_file_of_anything(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(BadInput):
        load(path, ["seed=1"])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(make_model(tmp_path_factory.mktemp("fuzz") / "model")), 64)


contents = st.one_of(trees, st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": trees}), max_size=2))
turns = st.lists(
    st.one_of(
        trees,
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "tool", ""]), "content": contents},
            optional={"reasoning_content": trees, "tool_calls": trees, "train": trees, "weight": st.integers(0, 1)},
        ),
        st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "System", "robot"]), "value": contents}),
    ),
    max_size=4,
)
lines = st.one_of(
    trees,
    st.fixed_dictionaries({"prompt": trees, "completion": trees}),
    st.fixed_dictionaries({"messages": st.one_of(trees, turns, turns.map(json.dumps))}, optional={"tools": trees}),
    st.fixed_dictionaries({"conversations": turns, "system": trees}),
    st.fixed_dictionaries({"prompt": turns, "completion": turns}),
    st.fixed_dictionaries({"instruction": trees, "output": trees, "input": trees, "history": trees}),
)


@quiet
@given(
    st.sampled_from(["jsonl", "json", "parquet"]),
    st.one_of(st.binary(max_size=60), st.lists(lines, max_size=4)),
    st.sampled_from(["auto", "chat", "prompt", "instruction"]),
    st.sampled_from([{}, {"prompt": "a.b", "completion": "completion.0"}]),
    st.sampled_from([0.0, 0.5]),
)
def test_data_of_anything(
    tmp_path: Path, encoder: ChatEncoder, kind: str, content: Any, form: str, fields: dict[str, str], wrong: float
) -> None:
    path = tmp_path / f"data.{kind}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(line) for line in content), encoding="utf-8", errors="surrogatepass")
    else:
        path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
    source = Source.model_validate({"files": [str(path)], "format": form, "fields": fields, "wrong": wrong})
    try:
        for place, row in rows(source, "here"):
            assert place.startswith(str(path))
            try:
                examples = encoder.encode(messages(row, source))
            except Unusable as reason:
                said(reason)
            else:
                assert examples
                for example in examples:
                    assert len(example.ids) == len(example.supervised)
                    assert any(example.supervised)
    except BadInput as problem:
        said(problem)
