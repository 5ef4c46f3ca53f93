"""SFT of θ₀ on a mixture, by Ray Train: workers that each run ``ideal.training`` on their share of every batch.

A worker that is alone, on CPUs, is a Ray task with Ray Train inside it: tasks take processes that are there already,
while a group of workers with its controller starts five new ones, 20 seconds for a small model's 5 of training.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from ideal.checkpoints import keep, latest
from ideal.config import ResourcesConfig, SftConfig
from ideal.costs import PASSES, TRAINING
from ideal.examples import ExampleSet
from ideal.model import load_tokenizer
from ideal.sharded import ShardedTrainer
from ideal.training import AVERAGE, Trainer, plan, train
from service.cluster import Cluster, on_one_worker
from service.files import MODEL, train_file
from service.progress import Reporter
from service.stages import WORK

RETRIES = 2
"""Of a training whose workers die."""


def sft(
    folder: Path,
    *,
    base: Path,
    data: Path,
    volumes: dict[str, int],
    config: SftConfig,
    averaged: float,
    seed: int,
    resources: ResourcesConfig,
    cluster: Cluster,
    sharded: bool,
    progress: Reporter,
) -> dict[str, Any]:
    """Fine-tune the base model on a mixture into ``folder/model``.

    A run that was killed goes on from its last checkpoint in ``folder/work``.

    Args:
        volumes: examples of each domain.
        averaged: share of the steps whose weights' mean is left in ``folder/average``, for influence.
        sharded: divide weights, gradients and moments among the workers.

    Returns:
        steps, tokens, passes, seconds, tokens_per_second, first_loss and last_loss; every step's loss is in steps.json.
    """
    task = {
        "folder": folder,
        "base": base,
        "data": data,
        "volumes": volumes,
        "config": config,
        "averaged": averaged,
        "seed": seed,
        "resources": resources,
        "cpus": cluster.sft_cpus,
        "sharded": sharded,
        "progress": progress,
    }
    if cluster.gpus or cluster.sft_workers > 1 or sharded:
        _group(task, cluster)
    else:
        task["kept"] = folder / WORK / "kept"
        on_one_worker(_train_here, task, cluster=cluster, seconds=resources.wait_seconds, what="SFT", retries=RETRIES)
    logs = json.loads((folder / "steps.json").read_text())
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


@ray.remote
def _train_here(task: dict[str, Any]) -> None:
    TorchTrainer(_worker, train_loop_config=task, scaling_config=ScalingConfig(num_workers=0)).fit()


def _worker(task: dict[str, Any]) -> None:
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
            logs = json.loads((Path(saved) / "steps.json").read_text())
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
        (task["folder"] / "steps.json").write_text(json.dumps(logs))
    if task["averaged"] and (rank == 0 or task["sharded"]):
        trainer.save_average(task["folder"] / AVERAGE)


def _checkpoint(trainer: Trainer | ShardedTrainer, logs: list[dict[str, Any]], rank: int, kept: Path | None) -> None:
    """A barrier for all workers; the first one's state is kept, or every one's part of it.

    Args:
        kept: where a lone worker keeps its state: for it alone, Ray Train doesn't.
    """
    keeps = rank == 0 or isinstance(trainer, ShardedTrainer)

    def save(folder: Path) -> None:
        if keeps:
            trainer.save_state(folder)
        if rank == 0:
            (folder / "steps.json").write_text(json.dumps(logs))

    if kept:
        keep(kept, trainer.next_step, save)
        return
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        metrics = {"step": trainer.next_step}
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if keeps else None)
