"""Rows from every kind of place, each with its place."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ideal.config.inputs import Source
from ideal.data.chat import Unusable
from ideal.data.sources import messages, rows
from ideal.errors import BadInput

ROWS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(5)]


def places(source: Source) -> list[str]:
    return [Path(place).name for place, _ in rows(source, "domains.math.train")]


def asked(row: dict[str, Any] | None, **settings: Any) -> list[tuple[str, Any]]:
    return [(m["role"], m["content"]) for m in messages(row, Source(files=["x"], **settings))]


def written(folder: Path, kind: str, made: list[Any]) -> str:
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
    elif kind == "json":
        path.write_text(json.dumps({"examples": {"train": made}}))
    else:
        pq.write_table(pa.Table.from_pylist(made), path)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_files(tmp_path: Path, kind: str) -> None:
    source = Source(files=[written(tmp_path, kind, ROWS)], records="examples.train")
    found = list(rows(source, "here"))
    assert [row for _, row in found] == ROWS
    assert places(source) == [f"data.{kind}:{line}" for line in (1, 2, 3, 4, 5)]
    some = source.model_copy(update={"rows": (1, 4)})
    assert places(some) == [f"data.{kind}:{line}" for line in (2, 3, 4)]
    assert places(some.model_copy(update={"size": 2})) == [f"data.{kind}:{line}" for line in (2, 3)]


def test_a_range_counts_in_each_file_and_globs_are_sorted(tmp_path: Path) -> None:
    for name in "ba":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = Source(files=[str(tmp_path / "*.jsonl")], rows=(3, 9))
    assert places(source) == ["a.jsonl:4", "a.jsonl:5", "b.jsonl:4", "b.jsonl:5"]


def test_lines_that_are_no_rows_keep_their_place(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "q", "completion": "a"}\n{"prompt": \n[1]\n\n \n' + b"[" * 100_000 + b"\n")
    found = list(rows(Source(files=[str(path)]), "here"))
    assert [row is None for _, row in found] == [False] + [True] * 3
    assert [place for place, _ in found] == [f"{path}:{line}" for line in (1, 2, 3, 6)], "blank lines are no rows"
    with pytest.raises(Unusable, match="malformed"):
        asked(None)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.json", "{", "is not JSON"),
        ("x.json", '{"examples": [], "other": 1}', "records to one of: examples"),
        ("x.parquet", "PAR1", "is not a Parquet file"),
        ("x.csv", "a,b", r"neither .jsonl, .ndjson, .json nor .parquet"),
    ],
)
def test_files_that_can_not_be_read(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=problem):
        places(Source(files=[str(tmp_path / name)]))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"domains.math.train.files: no such file: .*none.jsonl"):
        places(Source(files=[str(tmp_path / "none.jsonl")]))


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
QA = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("row", "form", "expected"),
    [
        ({"messages": CHAT}, "chat", QA),
        ({"prompt": "q", "completion": "a"}, "prompt", QA),
        ({"instruction": "q", "input": "", "output": "a"}, "instruction", QA),
        ({"instruction": "q", "input": "x", "output": "a"}, "instruction", [("user", "q\n\nx"), ("assistant", "a")]),
        ({"prompt": "q", "completion": "a", "system": "s"}, "prompt", [("system", "s"), *QA]),
    ],
)
def test_formats_are_found_and_can_be_named(row: dict[str, Any], form: str, expected: list[tuple[str, str]]) -> None:
    assert asked(row) == asked(row, format=form) == expected


def test_a_system_message_stands_once_and_the_rows_own_wins() -> None:
    assert asked({"prompt": "q", "completion": "a"}, system="s")[0] == ("system", "s")
    assert asked({"prompt": "q", "completion": "a", "system": "own"}, system="s")[0] == ("system", "own")
    own = [{"role": "system", "content": "own"}, *CHAT]
    assert asked({"messages": own}, system="s") == [("system", "own"), *QA]


def test_fields_reach_into_rows() -> None:
    row = {"task": {"text": "q"}, "instances": [{"output": "a"}]}
    fields = {"prompt": "task.text", "completion": "instances.0.output"}
    assert asked(row, fields=fields) == QA
    with pytest.raises(Unusable, match="malformed"):
        asked({"task": {"text": "q"}, "instances": []}, fields=fields, format="prompt")


def test_columns_that_fit_no_format_are_listed() -> None:
    with pytest.raises(Unusable, match=r"its columns \(answer, question\) fit none of chat, prompt, instruction"):
        asked({"question": "q", "answer": "a"})


def test_a_null_says_which_column_it_stands_in() -> None:
    """One row of thousands costs itself alone."""
    with pytest.raises(Unusable, match="malformed: no `completion`"):
        asked({"prompt": "q", "completion": None})


@pytest.mark.parametrize("row", [{"messages": "q"}, {"messages": ["q"]}])
def test_chats_that_are_none(row: dict[str, Any]) -> None:
    with pytest.raises(Unusable, match="malformed"):
        asked(row, format="chat")


def test_generated_rows() -> None:
    source = Source(reasoning_gym="chain_sum", size=4, seed=7)
    found = list(rows(source, "here"))
    assert [place for place, _ in found] == [f"chain_sum[7]:{i}" for i in (1, 2, 3, 4)]
    assert found == list(rows(source, "here"))
    later = [row for _, row in rows(source.model_copy(update={"seed": 9}), "here")]
    assert later[:2] == [row for _, row in found][2:], "item i is made from seed + i: what the config's check builds on"


@pytest.mark.parametrize(
    ("task", "options"), [("no_such_task", {}), ("chain_sum", {"no_such_option": 1}), ("chain_sum", {"min_terms": -1})]
)
def test_generated_rows_that_can_not_be_made(task: str, options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"here.reasoning_gym: ."):
        list(rows(Source(reasoning_gym=task, size=3, options=options), "here"))


def test_wrong_answers_are_other_rows_answers(tmp_path: Path) -> None:
    """The share that is asked for, of the usable rows, and always the same ones."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"q{n}", "completion": f"a{n}"}) for n in range(40)]
    path.write_text("\n".join([*lines[:20], "broken", *lines[20:]]))

    def answers(wrong: float) -> list[tuple[str, str]]:
        source = Source(files=[str(path)], wrong=wrong)
        talks = [messages(row, source) for _, row in rows(source, "x") if row]
        return [(talk[-2]["content"], talk[-1]["content"]) for talk in talks]

    assert answers(0) == [(f"q{n}", f"a{n}") for n in range(40)]
    some = answers(0.25)
    assert sum(q[1:] != a[1:] for q, a in some) == 10
    assert sorted(a for _, a in some) == sorted(f"a{n}" for n in range(40))
    assert some == answers(0.25)
    assert all(q[1:] != a[1:] for q, a in answers(1))


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """Opening it would wait for whoever writes."""
    os.mkfifo(tmp_path / "data.jsonl")
    with pytest.raises(BadInput, match="is no file"):
        places(Source(files=[str(tmp_path / "data.jsonl")]))


def test_a_date_that_python_does_not_have_costs_its_row_only(tmp_path: Path) -> None:
    days = pa.array([0, 10**9, 1], pa.int32()).cast(pa.date32())
    table = pa.table({"prompt": ["a", "b", "c"], "completion": ["A", "B", "C"], "when": days})
    pq.write_table(table, tmp_path / "data.parquet")
    found = list(rows(Source(files=[str(tmp_path / "data.parquet")]), "here"))
    assert [row and row["prompt"] for _, row in found] == ["a", None, "c"]


@pytest.mark.parametrize(("value", "number"), [("x", 1_000_000), ("x" * 50_000_000, 1)], ids=["rows", "a value"])
def test_a_parquet_file_that_unpacks_to_more_than_data_does(tmp_path: Path, value: str, number: int) -> None:
    path = tmp_path / "data.parquet"
    column = pa.array([value]).dictionary_encode().take(pa.array([0] * number, pa.int32()))
    pq.write_table(pa.table({"prompt": column, "completion": column}), path, compression="zstd")
    assert path.stat().st_size < 50_000
    with pytest.raises(BadInput, match=r"data.parquet.*bytes and unpacks to"):
        next(rows(Source(files=[str(path)]), "here"))


def test_a_field_is_not_a_number_of_another_script(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"a": ["Hi"], "completion": "Ho"}) + "\n")
    source = Source(files=[str(tmp_path / "data.jsonl")], fields={"prompt": "a.²"}, format="prompt")
    with pytest.raises(Unusable):
        messages(next(rows(source, "here"))[1], source)


ROW = '{"prompt": "Was ist ½?", "completion": "Größe"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.jsonl", ("\ufeff" + ROW).encode()),
        ("data.JSONL", ROW.encode()),
        ("data.ndjson", ROW.encode()),
        ("data[1].jsonl", ROW.encode()),
        ("data.jsonl.gz", gzip.compress(ROW.encode())),
        ("data.jsonl.zst", pa.Codec("zstd").compress(ROW.encode(), asbytes=True)),
        ("data.json", ("\ufeff[" + ROW + "]").encode()),
        ("data.Json.GZ", gzip.compress(f"[{ROW}]".encode())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # a packed file holds the time: no name for a test
)
def test_files_as_tools_leave_them(tmp_path: Path, name: str, content: bytes) -> None:
    """A byte order mark, capitals, another ending, what a pattern would read otherwise, and packed."""
    (tmp_path / name).write_bytes(content)
    ((place, row),) = rows(Source(files=[str(tmp_path / name)]), "here")
    assert (place, row) == (f"{tmp_path / name}:1", json.loads(ROW))


def test_a_file_that_two_patterns_find_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(ROW)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "data.jsonl")
    assert places(Source(files=[str(tmp_path / "*.jsonl"), str(tmp_path / "data.*")])) == ["data.jsonl:1"]


@pytest.mark.parametrize(
    ("encoding", "words"),
    [("latin-1", r":2: is not UTF-8: it looks like Latin-1"), ("utf-16", r"it looks like UTF-16")],
)
@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.jsonl.gz"])
def test_another_encoding_is_refused_and_named(tmp_path: Path, name: str, encoding: str, words: str) -> None:
    """A model would be trained on what a wrong decoding makes of it."""
    content = f'{{"prompt": "q", "completion": "a"}}\n{ROW}'.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(BadInput, match=words):
        places(Source(files=[str(tmp_path / name)]))


def test_a_packed_file_that_is_cut_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(ROW.encode())[:-9])
    with pytest.raises(BadInput, match=r"data\.jsonl\.gz: can't be read"):
        places(Source(files=[str(tmp_path / "data.jsonl.gz")]))


def test_a_line_without_an_end_is_given_up(tmp_path: Path) -> None:
    """Two hundred megabytes, packed to some kilobytes."""
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(bytes([32]) * 200_000_000))
    with pytest.raises(BadInput, match=r"data\.jsonl\.gz:1: is longer than"):
        places(Source(files=[str(tmp_path / "data.jsonl.gz")]))
