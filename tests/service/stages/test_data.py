"""The data is its content: what changes none of the examples changes no stage that follows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from ideal.config.config import Config
from ideal.config.file import load
from ideal.data.examples import ExampleSet
from ideal.errors import BadInput
from service.cluster.cluster import Cluster
from service.runs.mixtures import Inputs
from service.runs.runner import OnWorkers
from service.store.layout import reference_file, train_file
from service.store.stage import R_co, Record, Stage
from service.store.store import Store
from tests.service.conftest import record, tree

ROWS = 24
DIVISORS = {"reasoning_gym": "gcd", "options": {"min_value": 1, "max_value": 4}, "size": 40}
ASKED = "Find the Greatest Common Divisor (GCD) of these numbers: 4, 4. Give only the GCD as your final answer."
"""By that benchmark, whose space of questions is small."""


class Silent:
    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[..., None]]:
        yield lambda *_: None


class Reading(OnWorkers):
    """The first stages on a tiny tokenizer; it knows which of them ran."""

    def __init__(self, config: Config, base: Path) -> None:
        silent: Any = Silent()
        super().__init__(config, Cluster(1, 0, 1, 1, 1, 1), Store(config.root), silent)
        self.base = record("model", base, {})
        self.ran: list[str] = []

    def __call__(self, stage: Stage[R_co], name: str) -> Record[R_co]:
        if stage.kind == "model":
            return self.base
        found = super().__call__(stage, name)
        if found.fresh:
            self.ran.append(found.kind)
        return found


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Two domains of rows in files, one of them with a row that can't be used."""
    made: Any = tree(tmp_path / "store")
    for number, domain in enumerate(made["domains"]):
        domain["volume"] = 6
        for part, start in (("train", 0), ("reference", 500)):
            path = tmp_path / f"{domain['name']}-{part}.jsonl"
            numbers = range(number * 1000 + start, number * 1000 + start + ROWS)
            rows = [{"prompt": f"Say {n} twice.", "completion": f"{n} {n}"} for n in numbers]
            if part == "train":
                rows.append({"prompt": ASKED, "completion": "4"})
            path.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "empty", "completion": ""}])))
            domain[part] = {"files": [str(path)]}
    precision = {"precision": "fp32"}
    return {**made, "max_rejected": 0.1, "sft": precision, "influence": precision}


@pytest.fixture
def read(tmp_path: Path, base: Path) -> Callable[[dict[str, Any]], tuple[Reading, Record[Any]]]:
    def study(tree: dict[str, Any]) -> tuple[Reading, Record[Any]]:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        config = load(path)
        run = Reading(config, base)
        return run, Inputs(config, run).data

    return study


Read = Callable[[dict[str, Any]], tuple[Reading, Record[Any]]]


def test_a_benchmark_that_asks_none_of_the_examples_leaves_them_what_they_are(
    settings: dict[str, Any], read: Read
) -> None:
    first, before = read(settings)
    assert first.ran == ["examples", "data"]
    settings["benchmarks"].append({"name": "more", "reasoning_gym": "chain_sum", "size": 4, "seed": 9000})
    second, after = read(settings)
    assert second.ran == ["data"], "no row is read and encoded again"
    assert after.fingerprint == before.fingerprint
    assert after.folder != before.folder


def test_how_a_benchmark_is_asked_and_scored_is_no_matter_of_the_data(settings: dict[str, Any], read: Read) -> None:
    _, before = read(settings)
    settings["benchmarks"][0] |= {"limit": 2, "metric": "score", "max_new_tokens": 9, "chat": False, "name": "other"}
    study, after = read(settings)
    assert not study.ran
    assert (after.fingerprint, after.result) == (before.fingerprint, before.result)


def test_a_benchmark_that_asks_an_example_takes_it_out_and_makes_other_data(
    settings: dict[str, Any], read: Read
) -> None:
    _, before = read(settings)
    settings["benchmarks"].append({"name": "divisors", **DIVISORS, "seed": 4000})
    study, after = read(settings)
    assert study.ran == ["data"]
    assert after.fingerprint != before.fingerprint
    for name, found in after.result.items():
        assert (found["pool"], found["account"]["train"]["overlapping"]) == (ROWS, 1)
        assert (before.result[name]["pool"], found["account"]["train"]["used"]) == (ROWS + 1, ROWS)
        left, all_of_it = (ExampleSet.load(train_file(each.folder, name)) for each in (after, before))
        assert [ids.tolist() for ids, _ in left] == [ids.tolist() for ids, _ in all_of_it][:ROWS]
        assert len(ExampleSet.load(reference_file(after.folder, name))) == ROWS


def test_a_row_that_changes_is_other_data_and_one_that_moves_house_is_not(
    settings: dict[str, Any], read: Read, tmp_path: Path
) -> None:
    _, before = read(settings)
    file = Path(settings["domains"][0]["train"]["files"][0])
    settings["domains"][0]["train"]["files"] = [str(file.rename(tmp_path / "elsewhere.jsonl"))]
    _, moved = read(settings)
    assert moved.fingerprint == before.fingerprint
    (tmp_path / "elsewhere.jsonl").write_text((tmp_path / "elsewhere.jsonl").read_text().replace("0 0", "0 1"))
    _, changed = read(settings)
    assert changed.fingerprint != before.fingerprint


def test_too_many_unusable_rows_stop_every_run_and_change_no_data(settings: dict[str, Any], read: Read) -> None:
    _, before = read(settings)
    settings["max_rejected"] = 0.01
    for _ in range(2):
        with pytest.raises(
            BadInput, match=r"domains.math.reference: 1 of 25 rows can't be used, more than max_rejected"
        ):
            read(settings)
    settings["max_rejected"] = 0.5
    study, after = read(settings)
    assert not study.ran
    assert (after.fingerprint, after.result) == (before.fingerprint, before.result)
