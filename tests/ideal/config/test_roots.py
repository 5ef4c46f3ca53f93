"""On a cluster that others submit to, a config's paths stay where they may be."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ideal.config.file import parse
from ideal.config.roots import ROOTS
from ideal.errors import BadInput
from tests.service.conftest import tree

Change = Callable[[dict[str, Any], str], object]

PLACES: dict[str, Change] = {
    "storage": lambda t, path: t.update(storage=path),
    "model.source": lambda t, path: t.update(model={"source": path}),
    "model.chat_template": lambda t, path: t.update(model={"chat_template": path}),
    "benchmarks.own.include": lambda t, path: t.update(benchmarks=[{"name": "own", "task": "own", "include": path}]),
    "domains.math.train.files": lambda t, path: t["domains"][0].update(train={"files": [path]}),
    "domains.math.reference.files": lambda t, path: t["domains"][0].update(reference={"files": [f"{path}/**/*.jsonl"]}),
    "model.made.corpus.files": lambda t, path: t.update(
        model={"source": "made", "made": {"corpus": [{"files": [path]}]}}
    ),
    "domains.math.train.hub": lambda t, path: t["domains"][0].update(train={"hub": path}),
    "tracking.uri": lambda t, path: t.update(tracking={"uri": f"sqlite:///{path}/mlflow.db"}),
}


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(A folder that configs may use, one that they may not)."""
    inside, outside, job = tmp_path / "inside", tmp_path / "outside", tmp_path / "job"
    for folder in (inside, outside, job):
        folder.mkdir()
    monkeypatch.setenv(ROOTS, f"{inside}{os.pathsep}")
    monkeypatch.chdir(job)
    return inside, outside


@pytest.mark.parametrize("where", PLACES)
def test_every_path_stays_inside(roots: tuple[Path, Path], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it leads out: by its name, by `..`, or by a link."""
    inside, outside = roots
    (inside / "link").symlink_to(outside)
    for path in (inside / "x", Path("x")):
        made = tree(inside / "store")
        PLACES[where](made, str(path))
        parse(made, "test", Path.cwd())
    for path in (outside / "x", inside / ".." / "outside" / "x", inside / "link" / "x"):
        made = tree(inside / "store")
        PLACES[where](made, str(path))
        with pytest.raises(BadInput, match="outside of what this cluster lets configs use") as problem:
            parse(made, "test", inside)
        assert problem.value.where == where
        with monkeypatch.context() as alone:
            alone.delenv(ROOTS)
            parse(made, "test", inside)


@pytest.mark.parametrize(("link", "pattern"), [("a.jsonl", "*.jsonl"), ("a[1].jsonl", "a[1].jsonl")])
def test_a_link_among_a_patterns_files_is_followed(roots: tuple[Path, Path], link: str, pattern: str) -> None:
    """A name that looks like a pattern is one's own name first."""
    inside, outside = roots
    (outside / "secret.jsonl").write_text("{}")
    (inside / link).symlink_to(outside / "secret.jsonl")
    made = tree(inside / "store")
    made["domains"][0]["train"] = {"files": [f"{inside}/{pattern}"]}  # type: ignore[index]
    with pytest.raises(BadInput, match=r"jsonl is outside"):
        parse(made, "test", inside)


LEADING_OUT: dict[str, tuple[str, Change]] = {
    "a storage's URL": ("storage", lambda t, out: t.update(storage=f"file://{out}")),
    "a name that climbs": ("model.source", lambda t, out: t.update(model={"source": f"a/../../{Path(out).name}"})),
    "a plain path for MLflow": ("tracking.uri", lambda t, out: t.update(tracking={"uri": out})),
}


@pytest.mark.parametrize(("where", "change"), LEADING_OUT.values(), ids=LEADING_OUT)
def test_other_ways_out_are_closed(roots: tuple[Path, Path], where: str, change: Change) -> None:
    inside, outside = roots
    made = tree(inside / "store")
    change(made, str(outside))
    with pytest.raises(BadInput, match="outside of what this cluster lets configs use") as problem:
        parse(made, "test", inside)
    assert problem.value.where == where


def test_a_link_inside_a_models_folder_is_followed(roots: tuple[Path, Path]) -> None:
    inside, outside = roots
    (inside / "model").mkdir()
    (outside / "secret").write_text("")
    (inside / "model" / "tokenizer.json").symlink_to(outside / "secret")
    with pytest.raises(BadInput, match=r"tokenizer\.json is outside"):
        parse({**tree(inside / "store"), "model": {"source": str(inside / "model")}}, "test", inside)


@pytest.mark.parametrize("data", ["{out}/secret.jsonl", "../outside/secret.jsonl"])
def test_data_that_a_task_file_names_stays_inside(roots: tuple[Path, Path], data: str) -> None:
    inside, outside = roots
    (inside / "tasks").mkdir()
    task = f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data.format(out=outside)}}}}}\n"
    (inside / "tasks" / "own.yaml").write_text(task)
    made = tree(inside / "store")
    made["benchmarks"] = [{"name": "own", "task": "own", "include": str(inside / "tasks")}]
    with pytest.raises(BadInput, match=r"secret\.jsonl is outside"):
        parse(made, "test", inside)
