"""Adapters from the first line to the last: our method, and those that train or average models of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.command import Command
from tests.end_to_end.tiny_run import make_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
METHODS = ["joint", "doremi", "doge", "merge", "equilibrium"]


@pytest.fixture
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    tree = make_tree(tmp_path_factory.mktemp("inputs"))
    tree["sft"] |= {
        "epochs": 2,
        "learning_rate": 2e-2,
        "lora": {"rank": 8, "targets": ["q_proj", "up_proj", "down_proj"]},
    }
    tree["equilibrium"]["iterations"] = 1
    tree["methods"] = {"merge_candidates": 4}
    made = Command(tmp_path_factory.mktemp("lora"), tree)
    yield made
    made.clean()


def test_every_stage_takes_adapters_for_a_model(command: Command) -> None:
    ended = command("compare", "--seeds", "1", "--methods", ",".join(METHODS))
    assert ended.status == 0, ended.output
    (folder,) = (command.storage / "comparisons").iterdir()
    found = json.loads((folder / "compare.json").read_text())
    assert [row["label"] for row in found["rows"]] == METHODS
    losses = {row["label"]: row["runs"][0]["loss"] for row in found["rows"]}
    assert len(set(losses.values())) == len(METHODS), "each trained a mixture of its own"
    trained = [path.parent / "model" for path in command.records("sft")]
    assert len(trained) == len(METHODS) + 3
    for folder in trained:
        assert {file.name for file in folder.glob("*.safetensors")} == {"adapter_model.safetensors"}
        steps = json.loads((folder.parent / "steps.json").read_text())
        assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    (influence,) = command.records("influence")
    layers = json.loads(influence.read_text())["result"]["layers"]
    assert len(layers) == 2 * 2 * 2
    assert all("lora_" in layer for layer in layers)
