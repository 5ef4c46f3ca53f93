"""``ideal compare`` from its first line to its last: every method, killed in the middle and started again."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator

import pytest
from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from tests.command import Command, Ended
from tests.end_to_end.tiny_run import VOLUMES, make_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
COMPARE = ("compare", "--seeds", "1")
ROWS = [
    "joint",
    "base",
    "uniform",
    "leave_one_out",
    *(f"specific {domain}" for domain in VOLUMES),
    "random",
    "doremi",
    "doge",
    "merge",
    "regmix lightgbm",
    "regmix ridge",
    "equilibrium",
]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    tree = make_tree(tmp_path_factory.mktemp("inputs"))
    tree["sft"]["epochs"], tree["equilibrium"]["iterations"] = 1, 1
    tree["methods"] = {"regmix_runs": 8, "merge_candidates": 4}
    made = Command(tmp_path_factory.mktemp("compare"), tree)
    yield made
    made.clean()


@pytest.fixture(scope="module")
def compared(command: Command) -> Ended:
    """Killed while RegMix tries its mixtures, and started again."""
    return command.killed_and_again(*COMPARE, when=lambda: command.records("retraining"))


def test_every_method_is_trained_and_scored_on_the_same_total(command: Command, compared: Ended) -> None:
    assert compared.status == 0, compared.output
    assert "Traceback" not in compared.output
    (folder,) = (command.storage / "comparisons").iterdir()
    found = json.loads((folder / "compare.json").read_text())
    rows = {row["label"]: row for row in found["rows"]}
    assert list(rows) == ROWS
    for label, row in rows.items():
        assert sum(row["volumes"].values()) == (0 if label == "base" else sum(VOLUMES.values()))
        assert set(row["scores"]) == {"sums", "words"}
    assert min(rows["leave_one_out"]["volumes"].values()) == 0
    assert [duel["against"] for duel in found["duels"]] == ROWS[:-1]
    assert found["without_items"] == []
    assert rows["joint"]["volumes"] == VOLUMES
    assert max(rows["uniform"]["volumes"].values()) - min(rows["uniform"]["volumes"].values()) <= 1
    with (folder / "runs.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == list(rows)
    assert (folder / "compare.md").exists()


def test_methods_share_what_they_can(command: Command, compared: Ended) -> None:
    """Joint SFT is D0 and DoReMi's reference; the Specific SFTs are what is merged; both RegMix learn from one lot."""
    wanted = {"doremi": 1, "doge": 1, "merged": 1, "retraining": 8, "regmix": 2, "influence": 1}
    assert {kind: len(command.records(kind)) for kind in wanted} == wanted
    assert (
        len(command.records("sft")) <= 1 + 1 + 3 + 3 + 6 + 1
    )  # joint, uniform, all but one, specific, chosen ones, D1
    (folder,) = (command.storage / "comparisons").iterdir()
    spent = {row["label"]: row["search_share"] for row in json.loads((folder / "compare.json").read_text())["rows"]}
    assert spent["joint"] == spent["base"] == spent["uniform"] == spent["random"] == spent["specific sums"] == 0
    assert 2 < spent["doremi"] < 5  # the reference's SFT, and the proxy's steps, each training and two ways forward
    assert 1 < spent["doge"] < 4  # a domain's and a reference set's gradients
    assert 2 < spent["merge"] < 6
    assert 1 < spent["leave_one_out"] < 4  # two SFTs besides the one that it takes
    assert 1 < spent["regmix ridge"] < 4  # eight runs of a quarter of the examples, some of them longer
    assert 1 < spent["equilibrium"] < 20


def test_mlflow_has_one_comparison_with_a_run_for_each_method(command: Command, compared: Ended) -> None:
    client = MlflowClient(f"sqlite:///{command.storage / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("ideal").experiment_id])
    (top,) = [run for run in runs if MLFLOW_PARENT_RUN_ID not in run.data.tags]
    assert top.data.tags[MLFLOW_RUN_NAME] == "tiny comparison"
    below = [run for run in runs if run.data.tags.get(MLFLOW_PARENT_RUN_ID) == top.info.run_id]
    assert {run.data.tags[MLFLOW_RUN_NAME] for run in below} == {
        f"tiny {row}, seed 0" for row in [*ROWS, "equilibrium"]
    }
    assert all("score" in run.data.metrics for run in below)


def test_one_method_by_itself_is_a_run_that_is_there_already(command: Command, compared: Ended) -> None:
    one = command("run", "--set", "method=doremi")
    assert one.status == 0, one.output
    assert "nothing to do" in one.output
    assert "the mixture that `doremi` chose is trained" in one.output
    assert "influence of more" not in one.output


def test_nothing_is_left_running(command: Command, compared: Ended) -> None:
    command.leaves_nothing_running()
