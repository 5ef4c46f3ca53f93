"""SFT of θ₀ on a mixture, by Ray Train: workers that each run ``ideal.training.trainer`` on their share of every batch.

A worker that is alone, on CPUs, is a Ray task with Ray Train inside it: tasks take processes that are there already,
while a group of workers with its controller starts five new ones, 20 seconds for a small model's 5 of training.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ideal.config.config import SftConfig
from ideal.costs import PASSES, TRAINING
from service.cluster.cluster import Cluster
from service.stages.workers import Workers
from service.store.layout import MODEL, train_file
from service.store.stage import Record, Stage
from service.store.store import WORK

if TYPE_CHECKING:  # what takes seconds to load is loaded where it works
    from ideal.training.sharded import ShardedTrainer
    from ideal.training.trainer import Trainer

RETRIES = 2
"""Of a training whose workers die."""
STEPS = "steps.json"


class SftResult(TypedDict):
    """Tokens are supervised and padding both; losses are nats per supervised token of the first and the last batch."""

    steps: int
    tokens: int
    passes: int
    seconds: float
    tokens_per_second: float
    first_loss: float
    last_loss: float


@dataclass(frozen=True, kw_only=True)
class Sft(Stage[SftResult]):
    """SFT of θ₀ on a mixture: θ in the folder ``model``, every step in ``steps.json``.

    A run that was killed goes on from its last checkpoint in ``work``.

    Attributes:
        averaged: share of the steps whose weights' mean is left in ``average``, for influence.
        volumes: examples of each domain.
    """

    kind = "sft"
    version = 4
    sft: SftConfig
    averaged: float
    volumes: dict[str, int]
    seed: int
    base: Record[Any]
    data: Record[Any]

    def run(self, folder: Path, on: Workers) -> SftResult:
        sharded = on.sharded(self.base.folder / MODEL)
        task = {
            "folder": folder,
            "base": self.base.folder,
            "data": self.data.folder,
            "volumes": self.volumes,
            "config": self.sft,
            "averaged": self.averaged,
            "seed": self.seed,
            "resources": on.resources,
            "cpus": on.cluster.sft_cpus,
            "sharded": sharded,
            "progress": on.progress,
        }
        if on.cluster.gpus or on.cluster.sft_workers > 1 or sharded:
            _group(task, on.cluster)
        else:
            on.one(_train_here, {**task, "kept": folder / WORK / "kept"}, what="SFT", retries=RETRIES)
        logs = json.loads((folder / STEPS).read_text())
        seconds, tokens = sum(log["seconds"] for log in logs), sum(log["tokens"] for log in logs)
        return {
            "steps": len(logs),
            "tokens": tokens,
            PASSES: TRAINING * tokens,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
            "first_loss": logs[0]["loss"],
            "last_loss": logs[-1]["loss"],
        }


def _group(task: dict[str, Any], cluster: Cluster) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(task["resources"].wait_seconds)
    TorchTrainer(
        _worker,
        train_loop_config=task,
        scaling_config=ScalingConfig(
            num_workers=cluster.sft_workers,
            use_gpu=bool(cluster.gpus),
            resources_per_worker=cluster.per_worker(cluster.sft_cpus),
        ),
        torch_config=TorchConfig(backend="nccl" if cluster.gpus else "gloo"),
        run_config=RunConfig(
            name="sft-sharded" if task["sharded"] else "sft",  # neither goes on from the other's checkpoint
            storage_path=str(task["folder"] / WORK),
            failure_config=FailureConfig(max_failures=RETRIES),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    ).fit()


def _train_here(task: dict[str, Any]) -> None:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(_worker, train_loop_config=task, scaling_config=ScalingConfig(num_workers=0)).fit()


def _worker(task: dict[str, Any]) -> None:
    import ray.train.torch
    import torch
    from ray.train import Checkpoint

    from ideal.data.examples import ExampleSet
    from ideal.model.base import load_tokenizer
    from ideal.training.checkpoints import latest
    from ideal.training.sharded import ShardedTrainer
    from ideal.training.trainer import AVERAGE, Trainer, plan, train

    config, resources, volumes = task["config"], task["resources"], task["volumes"]
    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(task["seed"])
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(task["cpus"])
    pools = {domain: ExampleSet.load(train_file(task["data"], domain)) for domain in volumes}
    kind = ShardedTrainer if task["sharded"] else Trainer
    trainer = kind(task["base"] / MODEL, config, device, resources.batch_tokens, resources.gradient_checkpointing)
    logs: list[dict[str, Any]] = []
    kept: Path | None = task.get("kept")
    if kept:
        last = latest(kept)
        checkpoint = Checkpoint.from_directory(last) if last else None
    else:
        checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as saved:
            trainer.load_state(Path(saved))
            logs = json.loads((Path(saved) / STEPS).read_text())
    total = len(plan(volumes, config, task["seed"]))
    started = time.monotonic()
    for log in train(trainer, pools, volumes, task["seed"], task["averaged"]):
        logs.append({**asdict(log), "seconds": round(time.monotonic() - started, 4)})
        started = time.monotonic()
        if rank == 0:
            task["progress"](f"loss {log.loss:.3f}", log.step + 1, total)
        if (log.step + 1) % resources.checkpoint_steps == 0 and log.step + 1 < total:
            _checkpoint(trainer, logs, rank, kept)
            started = time.monotonic()
    if rank == 0 or task["sharded"]:
        trainer.save_model(task["folder"] / MODEL)
        trainer.save_damping(task["folder"])
    if rank == 0:
        load_tokenizer(task["base"] / MODEL).save_pretrained(task["folder"] / MODEL)
        (task["folder"] / STEPS).write_text(json.dumps(logs))
    if task["averaged"] and (rank == 0 or task["sharded"]):
        trainer.save_average(task["folder"] / AVERAGE)


def _checkpoint(trainer: Trainer | ShardedTrainer, logs: list[dict[str, Any]], rank: int, kept: Path | None) -> None:
    """A barrier for all workers; the first one's state is kept, or every one's part of it.

    Args:
        kept: where a lone worker keeps its state: for it alone, Ray Train doesn't.
    """
    import ray.train

    from ideal.training.checkpoints import keep
    from ideal.training.sharded import ShardedTrainer

    keeps = rank == 0 or isinstance(trainer, ShardedTrainer)

    def save(folder: Path) -> None:
        if keeps:
            trainer.save_state(folder)
        if rank == 0:
            (folder / STEPS).write_text(json.dumps(logs))

    if kept:
        keep(kept, trainer.next_step, save)
        return
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        metrics = {"step": trainer.next_step}
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder) if keeps else None)
