"""The peak memory of stages' workers on models, each in a process of its own.

    python -m tests.service.peak FOLDER …

A folder holds the model and the examples as the first stages leave them, and a ``Config`` in config.json. Prints, for
each folder and each of ``STAGES``, by how many bytes a process grew over what it held once everything was imported and
the libraries had worked a little.
"""

from __future__ import annotations

import os
import sys
import tempfile
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from ideal.config.config import Config
from ideal.data.examples import ExampleSet
from ideal.influence.layers import layer_shapes
from ideal.training.sharded import ShardedTrainer
from ideal.training.trainer import Step, Trainer, plan
from service.stages.influence_actor import InfluenceActor
from service.stages.sample import Sample
from service.store.layout import MODEL, train_file

STAGES = ("sft", "sharded", "pass", "solve", "solve jointly")


def main(folders: list[Path]) -> None:
    for folder in folders:
        config = Config.model_validate_json((folder / "config.json").read_text())
        for stage in STAGES:
            if os.fork():
                _, status = os.wait()
                if status:
                    sys.exit(f"{stage} in {folder} failed")
            else:
                print(measured(stage, folder, config))
                sys.stdout.flush()
                os._exit(0)


def measured(stage: str, folder: Path, config: Config) -> int:
    """Bytes by which this process grows at most while it does a stage's work."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp(dir=folder)}/meet", rank=0, world_size=1)
    warm_up(config)
    before = status("VmRSS")
    work(stage, folder, config)
    return status("VmHWM") - before


def work(stage: str, folder: Path, config: Config) -> None:
    """What a worker of this stage does; of solving, the most expensive layer's or, jointly, all of it."""
    volumes = {domain.name: domain.volume or 1 for domain in config.domains}
    resources = config.resources
    if stage in ("sft", "sharded"):
        where, kind = torch.device("cpu"), Trainer if stage == "sft" else ShardedTrainer
        trainer = kind(folder / MODEL, config.sft, where, resources.batch_tokens, resources.gradient_checkpointing)
        items = list(chain(*(ExampleSet.load(train_file(folder, domain)) for domain in volumes)))
        for step in plan(volumes, config.sft, 0)[:2]:  # AdamW's moments are there from the second step's beginning
            trainer.step(step, [items[position] for position in step.picks])
            trainer.take_snapshot()
        return
    joint = {"joint": stage == "solve jointly"}
    config = config.model_copy(update={"influence": config.influence.model_copy(update=joint)})
    layers = list(layer_shapes(AutoConfig.from_pretrained(folder / MODEL), config.influence.layers))
    sample = Sample(folder, volumes, config.influence, config.seed)
    actor = InfluenceActor.__ray_metadata__.modified_class(
        folder / MODEL, sample, layers, folder / "work", resources.batch_tokens
    )
    if stage == "pass":
        actor.accumulate(0, list(range(len(sample.blocks()))), None)
    elif stage == "solve":
        actor.solve(layers[-3:], 1, None)  # one layer's gate, up and down
    else:
        actor.solve(layers, 1, None)
        actor.forms(layers, [0, 1], 1)


def warm_up(config: Config) -> None:
    """Have the libraries load what they load at their first use."""
    shape = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(shape).save_pretrained(folder)
        for kind in (Trainer, ShardedTrainer):
            trainer = kind(Path(folder), config.sft, torch.device("cpu"), 8)
            trainer.step(Step(0, [0], 1e-5), [(np.arange(9, dtype=np.int32), np.arange(9) > 0)])
    layer_shapes(shape, ["*.mlp.*"])
    torch.linalg.eigh(torch.eye(64, dtype=torch.float64))


def status(field: str) -> int:
    """Bytes of a field of this process's status: VmRSS is what it holds, VmHWM the most that it ever held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
