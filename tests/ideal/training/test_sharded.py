"""A model that is divided among workers trains as one that isn't (`gloo`, two processes on the CPU)."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ideal.model.base import load_model
from ideal.training.sharded import ShardedTrainer
from ideal.training.trainer import AVERAGE, DAMPING, Trainer, plan, train
from tests.ideal.training.test_trainer import CPU, FP32, POOLS, VOLUMES
from tests.tiny import make_model
from tests.waiting import HANGS

AVERAGED = 0.6
ROOT = Path(__file__).parents[3]


def worker(rank: int, world: int, folder: Path, base: Path, stops: int, starts: Path | None) -> None:
    """All of a run, or a part of it that ends after some steps or goes on from a state; runs in its own process."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=HANGS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=limit)
    config = FP32.model_copy(update={"precision": "bf16"}) if folder.name == "bf16" else FP32
    trainer = ShardedTrainer(base, config, CPU, 64, gradient_checkpointing=folder.name == "again")
    if starts:
        trainer.load_state(starts)
    logs = list(islice(train(trainer, POOLS, VOLUMES, 3, AVERAGED), stops))
    trainer.save_state(folder)
    trainer.save_damping(folder)
    trainer.save_model(folder / ("model" if rank == 0 else "nothing"))
    trainer.save_average(folder / AVERAGE) if trainer.snapshots else None
    if rank == 0:
        held = sum(p.to_local().numel() for p in trainer.weights.values())  # type: ignore[operator]
        (folder / "logs.json").write_text(json.dumps({"logs": [asdict(log) for log in logs], "held": held}))
    dist.destroy_process_group()


def run(folder: Path, base: Path, world: int = 2, stops: int = 100, starts: Path | None = None) -> Path:
    """The folder with what the workers left."""
    folder.mkdir()
    code = """
import sys
from pathlib import Path
from tests.ideal.training.test_sharded import worker
rank, world, folder, base, stops, starts = sys.argv[1:]
worker(int(rank), int(world), Path(folder), Path(base), int(stops), Path(starts) if starts else None)
"""
    told = [str(world), str(folder), str(base), str(stops), str(starts or "")]
    workers = [subprocess.Popen([sys.executable, "-c", code, str(rank), *told], cwd=ROOT) for rank in range(world)]
    try:
        assert [process.wait(HANGS) for process in workers] == [0] * world
    finally:
        for process in workers:
            process.kill()
    return folder


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in load_model(folder, torch.float32).parameters()])


def losses(folder: Path) -> list[float]:
    return [log["loss"] for log in json.loads((folder / "logs.json").read_text())["logs"]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "m", layers=2)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, list[float], Path]:
    """Undivided: the trainer, its losses, and a folder with what it leaves."""
    folder, trainer = tmp_path_factory.mktemp("whole"), Trainer(base, FP32, CPU, 64)
    logs = [log.loss for log in train(trainer, POOLS, VOLUMES, 3, AVERAGED)]
    trainer.save_damping(folder)
    trainer.save_model(folder / "model")
    trainer.save_average(folder / AVERAGE)
    return trainer, logs, folder


@pytest.fixture(scope="module")
def divided(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("divided") / "run", base)


def test_two_workers_train_what_one_does(whole: tuple[Trainer, list[float], Path], divided: Path) -> None:
    """The last batch has one example: the second worker makes passes that count for nothing."""
    _, right, folder = whole
    assert len(plan(VOLUMES, FP32, 3)[-1].picks) == 1
    assert losses(divided) == pytest.approx(right, rel=1e-5)
    assert not (divided / "nothing").exists(), "the first worker alone writes"
    for kind in ("model", AVERAGE):
        torch.testing.assert_close(weights(divided / kind), weights(folder / kind), rtol=0, atol=3e-5)
    assert torch.dist(weights(folder / AVERAGE), weights(folder / "model")) > 1e-3
    found, damping = load_file(divided / DAMPING), load_file(folder / DAMPING)
    assert set(found) == set(damping)
    for name, stiffness in damping.items():
        torch.testing.assert_close(found[name], stiffness, rtol=0.02, atol=0)  # bf16, rounded twice


def test_each_worker_holds_its_half(whole: tuple[Trainer, list[float], Path], divided: Path) -> None:
    total = sum(p.numel() for p in whole[0].model.parameters())
    held = json.loads((divided / "logs.json").read_text())["held"]
    assert held == pytest.approx(total / 2, rel=0.02)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_taken_up_by_as_many_or_fewer_workers_goes_on(
    whole: tuple[Trainer, list[float], Path], base: Path, tmp_path: Path, world: int
) -> None:
    """With gradient checkpointing, too, which changes nothing."""
    first = run(tmp_path / "first", base, stops=2)
    second = run(tmp_path / "again", base, world, starts=first)
    assert losses(first) + losses(second) == pytest.approx(whole[1], rel=1e-5)
    for kind in ("model", AVERAGE):
        torch.testing.assert_close(weights(second / kind), weights(whole[2] / kind), rtol=0, atol=3e-5)


def test_masters_are_fp32_under_a_bf16_model(
    whole: tuple[Trainer, list[float], Path], base: Path, tmp_path: Path
) -> None:
    folder = run(tmp_path / "bf16", base)
    assert losses(folder) == pytest.approx(whole[1], rel=0.02)
    assert {
        t.dtype for name, t in load_file(folder / "state-0.safetensors").items() if name.startswith("weights/")
    } == {torch.float32}
    assert load_file(folder / "model" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
