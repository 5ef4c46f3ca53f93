"""What the service's tests share: one Ray for the whole session, a tiny model, tiny data, an outcome made by hand."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import yaml

from ideal.config.config import Config
from ideal.config.file import parse
from ideal.data.chat import Example
from ideal.data.examples import ExampleSet
from ideal.equilibrium import Update
from ideal.influence.table import InfluenceTable
from service.cluster import environment
from service.outcome import Iteration, Outcome
from service.store.layout import MODEL, reference_file, train_file
from service.store.stage import Record
from tests.tiny import make_model

environment.prepare()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray of two CPUs; its folder is short, since sockets live in it, and goes away with it."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    ray.init(address="local", num_cpus=2, _temp_dir=folder, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model stage's folder."""
    folder = tmp_path_factory.mktemp("base")
    make_model(folder / MODEL, layers=2, hidden=32)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data stage's folder: two domains of different lengths and tokens, 24 examples each, half of it reference."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for domain, low, high, longest in (("math", 10, 60, 12), ("chat", 100, 200, 30)):
        for path in (train_file(folder, domain), reference_file(folder, domain)):
            examples = []
            for length in random.integers(8, longest, 24 if path == train_file(folder, domain) else 12):
                answer = int(random.integers(2, length - 2))
                mask = [False] * (length - answer) + [True] * answer
                examples.append(Example(random.integers(low, high, length).tolist(), mask, "?"))
            ExampleSet.of(examples).save(path)
    return folder


def tree(storage: Path) -> dict[str, object]:
    """A config's settings: the smallest that are valid; tests change what they are about."""

    def source(seed: int, size: int) -> dict[str, object]:
        return {"reasoning_gym": "chain_sum", "size": size, "seed": seed}

    return {
        "name": "tiny",
        "storage": str(storage),
        "domains": [
            {"name": "math", "volume": 12, "train": source(0, 24), "reference": source(1000, 12)},
            {"name": "chat", "volume": 6, "train": source(2000, 24), "reference": source(3000, 12)},
        ],
        "benchmarks": [{"name": "sums", "reasoning_gym": "chain_sum", "size": 4, "seed": 4000}],
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A config's file."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path / "store")))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """One that can be run: no precision is `auto`."""
    return parse(tree(tmp_path / "store"), "test", tmp_path).decided("fp32")


def record(kind: str, folder: Path, result: dict[str, object]) -> Record:
    folder.mkdir(parents=True, exist_ok=True)
    return Record(kind, f"{kind}-of-{folder.parent.name}", folder, result, 1.5, fresh=True)


def iteration(folder: Path, number: int, *, accepted: bool = True, last: bool = False) -> Iteration:
    """D0, D1, … as a run would leave them; ``last`` has neither influence nor update."""
    trained = record("sft", folder / "sft", {"steps": 3})
    steps = [{"step": n, "loss": 3.0 - n, "norm": 1.0, "tokens": 9, "seconds": 0.1} for n in range(3)]
    (trained.folder / "steps.json").write_text(json.dumps(steps))
    losses = {"math": {"loss": 1.25 - number / 8, "tokens": 40}, "chat": {"loss": 2.0, "tokens": 60}}
    made = Iteration(
        number,
        {"math": 12 + number, "chat": 6 - number},
        None if number == 0 else 0.15,
        trained,
        record("reference", folder / "reference", losses),
        1.625 - number / 16,
        accepted,
    )
    score = {"metric": "score", "value": 0.25 * (number + 1), "stderr": 0.125, "items": 4}
    made.benchmark = record("benchmark", folder / "benchmark", {"sums": score})
    if not last:
        made.influence = record("influence", folder / "influence", {})
        products = np.random.default_rng(number).normal(size=(3, 2, 4, 2, 4))
        tokens = np.full((2, 4), 10.0)
        made.table = InfluenceTable(products, tokens, tokens, np.array([1.0, 2.0]), np.zeros((2, 2)))
        made.update = Update([0.5, -0.25], [0.1, -0.4], [0.9, 0.3], 0.01, [0.15, -0.3], [13, 5])
    return made


@pytest.fixture
def outcome(tmp_path: Path) -> Outcome:
    """D0, a D1 that was rejected, the D1 that was taken instead, and the end."""
    account = {
        "rows": 24,
        "used": 23,
        "rejected": {"empty": 1},
        "rejected_rows": ["a.jsonl:7: empty"],
        "overlapping": 2,
    }
    found = {
        domain: {"pool": 23, "reference": 12, "tokens_per_example": 5.0, "account": {"train": account}}
        for domain in ("math", "chat")
    }
    return Outcome(
        record("data", tmp_path / "run" / "data", found),
        [
            iteration(tmp_path / "run" / "0", 0),
            iteration(tmp_path / "run" / "1", 1, accepted=False, last=True),
            iteration(tmp_path / "run" / "2", 1, last=True),
        ],
        "all 1 iterations done",
    )
