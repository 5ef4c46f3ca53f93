"""SFT on Ray Train: the same weights for any number of workers, killed or not, in a folder that transformers loads."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ideal.config.config import ResourcesConfig, SftConfig
from ideal.config.file import parse
from ideal.training.trainer import AVERAGE
from service.cluster.cluster import Cluster
from service.stages.sft import Sft
from service.store.layout import MODEL, for_influence
from service.store.stage import Record
from service.store.store import WORK
from tests.service.conftest import tree
from tests.service.made import workers as workers_of
from tests.waiting import HANGS

VOLUMES = {"math": 20, "chat": 12}
SETTINGS = SftConfig(precision="fp32", learning_rate=1e-3, batch_examples=4)
STEPS = 8
Progress = Callable[[str, int, int], None]
pytestmark = pytest.mark.usefixtures("ray_session")


def fit(
    folder: Path, base: Path, data: Path, workers: int, progress: Progress, sharded: bool = False
) -> dict[str, Any]:
    (folder / WORK).mkdir(parents=True)
    theta, examples = (
        Record(kind, kind, place, {}, 0.0, fresh=False) for kind, place in (("model", base), ("data", data))
    )
    stage = Sft(sft=SETTINGS, averaged=0.75, volumes=VOLUMES, seed=0, base=theta, data=examples)
    resources = ResourcesConfig(
        checkpoint_steps=3, batch_tokens=64, wait_seconds=HANGS, shard="always" if sharded else "never"
    )
    config = parse(tree(folder / "store"), "test", folder).decided("fp32").model_copy(update={"resources": resources})
    cluster = Cluster(cpus=2, gpus=0, nodes=1, sft_workers=workers, sft_cpus=1, influence_workers=1)
    return dict(stage.run(folder, workers_of(config, cluster, progress)))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> tuple[Path, dict[str, Any]]:
    """One worker that nothing disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, fit(folder, base, data, 1, lambda *_: None)


def weights(folder: Path, kind: str = MODEL) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder / kind)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def losses(folder: Path) -> list[float]:
    return [log["loss"] for log in json.loads((folder / "steps.json").read_text())]


def test_it_learns_and_says_how_fast(alone: tuple[Path, dict[str, Any]]) -> None:
    folder, result = alone
    assert result["steps"] == STEPS == len(losses(folder))
    assert result["last_loss"] < result["first_loss"]
    assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["seconds"], rel=0.01)


def test_the_folder_loads_in_transformers(alone: tuple[Path, dict[str, Any]], base: Path) -> None:
    folder, _ = alone
    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL)
    assert tokenizer.chat_template
    assert tokenizer("12 + 34").input_ids == AutoTokenizer.from_pretrained(base / MODEL)("12 + 34").input_ids
    assert weights(folder).dtype == torch.float32
    assert (weights(folder) - weights(base)).abs().max() > SETTINGS.learning_rate  # trained for several steps


@pytest.mark.parametrize("sharded", [False, True])
def test_two_workers_give_what_one_gives(
    tmp_path: Path, alone: tuple[Path, dict[str, Any]], base: Path, data: Path, sharded: bool
) -> None:
    """The loss is the mean over all supervised tokens of the global batch, however it and the model are cut."""
    fit(tmp_path / "two", base, data, 2, lambda *_: None, sharded)
    assert losses(tmp_path / "two") == pytest.approx(losses(alone[0]), rel=1e-4)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(alone[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_killed_worker_goes_on_from_its_checkpoint(
    tmp_path: Path, alone: tuple[Path, dict[str, Any]], base: Path, data: Path, sharded: bool
) -> None:
    """Killed once, in step 5 with a checkpoint behind step 3: it goes on with step 4 to the same weights."""
    seen, work = tmp_path / "seen", tmp_path / "killed" / WORK

    def dies_once(message: str, done: int, total: int) -> None:
        before = seen.read_text() if seen.exists() else ""
        seen.write_text(f"{before}{done} ")
        if done == 5 and "5" not in before:
            kept = "checkpoint_manager_snapshot.json" if sharded else "step-00000003"
            while not list(work.rglob(kept)):
                time.sleep(0.1)  # Ray Train hasn't heard of the checkpoint yet
            os.kill(os.getpid(), signal.SIGKILL)

    fit(tmp_path / "killed", base, data, 2 if sharded else 1, dies_once, sharded)
    assert seen.read_text().split() == ["1", "2", "3", "4", "5", "4", "5", "6", "7", "8"]
    exact = 1e-4 if sharded else 1e-6  # sums in another order
    assert losses(tmp_path / "killed") == pytest.approx(losses(alone[0]), rel=exact)
    torch.testing.assert_close(weights(tmp_path / "killed"), weights(alone[0]), rtol=0, atol=exact)
    average = weights(alone[0], AVERAGE)
    torch.testing.assert_close(weights(tmp_path / "killed", AVERAGE), average, rtol=0, atol=exact)
    assert (average - weights(alone[0])).abs().max() > 1e-5, "it isn't the last step's"
    assert for_influence(alone[0]) == alone[0] / AVERAGE
