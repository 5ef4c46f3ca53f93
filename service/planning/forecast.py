"""``ideal plan``: time and memory of each stage, for this machine or for one that isn't there.

The formulas are in ``service.planning.times`` and ``service.planning.memory``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PretrainedConfig

from ideal.config.config import Config
from ideal.config.inputs import Source
from ideal.data.sources import rows
from ideal.errors import BadInput
from ideal.model import base as models
from ideal.model.precision import probe
from service.cluster import cluster
from service.cluster.precision import decide
from service.planning.memory import GIB, Sizes
from service.planning.plan import Plan, estimate
from service.planning.times import ABSENT_GPU, Seconds, Work, calibrate, seconds

TOKENS_PER_EXAMPLE = 256

TRAIN_EXAMPLES, REFERENCE_EXAMPLES = 10_000, 500
"""Assumed of a hub's split whose rows the config doesn't say."""


def forecast(
    config: Config,
    console: Console,
    *,
    model: str | None = None,
    gpus: int | None = None,
    gpu_memory: str | None = None,
    tflops: float | None = None,
    tokens_per_example: int = TOKENS_PER_EXAMPLE,
) -> None:
    """Print what a run takes.

    Args:
        model: config.json, model folder or hub id. Default: the config's.
        gpus: of the machine that is planned for. Default: this machine, or the config's GPUs if it has fewer.
        gpu_memory: of each, e.g. 80GB or 75GiB.
        tflops: of each, in the model's passes.

    Raises:
        BadInput: no shapes for the model, a size that is none, or local data that isn't there.
    """
    shapes = read_shapes(config, model)
    sizes = Sizes.of(shapes, config.influence.layers, config.sft.lora)
    here = None
    if gpus is None and gpu_memory is None and tflops is None:
        try:
            here = cluster.local(config)
        except BadInput as problem:
            if problem.where != "resources.gpus":
                raise
    work, notes = read_work(config, tokens_per_example)
    if here:
        machine, memory = here, None
        decision = decide([config], notes.append, begins=False)
        (config,) = decision.configs
        notes.append(f"computed in {decision}; measured here: {probe()}")
        alone = calibrate(config, shapes, 1)
        together = alone if machine.gpus or machine.sft_cpus == 1 else calibrate(config, shapes, machine.sft_cpus)
        notes.insert(0, f"measured here, one influence worker: {alone}")
        if together is not alone:
            notes.insert(1, f"measured here, one SFT worker of {machine.sft_cpus} CPUs: {together}")
    else:
        config = config.decided("bf16")  # as GPUs have it
        count = gpus or config.resources.gpus or 1
        wanted = config.resources.model_copy(update={"gpus": count})
        machine, memory = cluster.share(count * 8, count, 1, wanted), read_bytes(gpu_memory or "80GB")
        alone = together = replace(ABSENT_GPU, model=tflops * 1e12 if tflops else ABSENT_GPU.model)
        notes.insert(0, f"assumed, not measured, of each GPU: {alone}, links {alone.link / 1e9:.0f} GB/s")
    found = estimate(config, shapes, machine, memory)
    taken = seconds(config, sizes, machine, found.layer_blocks, work, alone, together, sharded=found.sharded)
    what = f"{machine.gpus} GPUs of {memory / 1e9:.0f} GB" if memory else machine.describe()
    console.print(f"{Path(model or config.model.source).stem}: {sizes.parameters / 1e9:.2f} B parameters on {what}")
    console.print(_table(found, machine, taken))
    if found.sft_fits and found.influence_fits:
        rounds = config.equilibrium.iterations
        total = (rounds + 1) * (taken.sft + taken.reference)
        total += rounds * (taken.influence_pass + taken.influence_solve)
        console.print(f"D0 to D{rounds} without benchmarks: {_time(total)}")
    console.print(
        f"disk: {found.scratch / GIB:.1f} GiB while an influence is computed, {found.checkpoints / GIB:.1f} for good"
    )
    for line in [*notes, *_advice(config, shapes, machine, memory, found)]:
        console.print(f"- {line}", soft_wrap=True)


def read_shapes(config: Config, model: str | None) -> PretrainedConfig:
    """The configuration of ``--model``, else of the config's model.

    Raises:
        BadInput: there is none.
    """
    if model is None:
        found: PretrainedConfig | None = models.shapes(config.model)
    else:
        try:
            found = AutoConfig.from_pretrained(model)
        except Exception:  # no such file, not a model's, or a hub that doesn't answer
            found = None
    if found is None:
        raise BadInput(
            "--model" if model else "model.source",
            f"no shapes of {model or config.model.source}: neither a config.json nor to be had from the hub",
            "give --model; jobs/configs/shapes/ has some",
        )
    return found


def read_bytes(text: str) -> int:
    """Bytes of e.g. 80GB or 75GiB.

    Raises:
        BadInput: it is neither.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB)", text.strip())
    if not found:
        raise BadInput("--gpu-memory", f"{text!r} is no size", "e.g. 80GB or 75GiB")
    return int(float(found[1]) * (1e9 if found[2] == "GB" else GIB))


def read_work(config: Config, tokens_per_example: int) -> tuple[Work, list[str]]:
    """Examples from volumes, sizes and split bounds; and what had to be assumed."""
    assumed: list[str] = []

    def examples(source: Source, where: str, otherwise: int) -> int:
        if not source.hub:
            return source.size if source.reasoning_gym and source.size else sum(1 for _ in rows(source, where))
        bounds = re.search(r"\[(\d*):(\d+)\]$", source.split)
        if source.size or bounds:
            return source.size or int(bounds[2]) - int(bounds[1] or 0)  # type: ignore[index]
        assumed.append(f"{where} {otherwise}")
        return otherwise

    volumes = [d.volume or examples(d.train, f"domains.{d.name}.train", TRAIN_EXAMPLES) for d in config.domains]
    reference = sum(examples(d.reference, f"domains.{d.name}.reference", REFERENCE_EXAMPLES) for d in config.domains)
    notes = [f"assumed: {tokens_per_example} tokens in an example (--tokens-per-example)"]
    if assumed:
        notes.append(f"assumed examples: {', '.join(assumed)}")
    return Work(volumes, reference, tokens_per_example), notes


def _table(found: Plan, machine: cluster.Cluster, taken: Seconds) -> Table:
    table = Table("stage", "workers", "GiB each", "of", "time", "verdict")
    blocks, shards = found.layer_blocks, found.shards
    actors = f"{blocks} layer block{'s' * (blocks > 1)} × {shards} shard{'s' * (shards > 1)}"
    unplaced = "" if blocks <= found.workers else f"doesn't fit {found.workers} workers: one for each block"
    sft = f"SFT, sharded over {machine.sft_workers}" if found.sharded else "SFT"
    for stage, workers, memory, room, time_, problem in (
        (sft, str(machine.sft_workers), found.sft, found.sft_available, taken.sft, ""),
        ("reference loss", "1", found.reference, found.sft_available, taken.reference, ""),
        ("influence: pass", actors, found.influence_pass, found.available, taken.influence_pass, unplaced),
        ("influence: solve", actors, found.influence_solve, found.available, taken.influence_solve, unplaced),
    ):
        verdict = problem or ("fits" if memory <= room else "doesn't fit")
        cells = f"{memory / GIB:.1f}", f"{room / GIB:.1f}", _time(time_) if verdict == "fits" else "–"
        table.add_row(stage, workers, *cells, verdict)
    table.add_row("benchmarks", "1", "–", "–", "–", "not predicted; vLLM takes the memory it is given")
    return table


def _advice(
    config: Config, shapes: PretrainedConfig, machine: cluster.Cluster, memory: int | None, found: Plan
) -> list[str]:
    """The largest forward pass with which a stage fits that doesn't."""
    lines = []
    wanting = {"SFT": not found.sft_fits, "influence": not found.influence_fits}
    tokens = config.resources.batch_tokens // 2
    while tokens >= config.model.max_tokens and any(wanting.values()):
        less = config.model_copy(update={"resources": config.resources.model_copy(update={"batch_tokens": tokens})})
        smaller = estimate(less, shapes, machine, memory)
        for stage, fits in (("SFT", smaller.sft_fits), ("influence", smaller.influence_fits)):
            if wanting[stage] and fits:
                lines.append(f"{stage} fits with --set resources.batch_tokens={tokens}")
                wanting[stage] = False
        tokens //= 2
    return lines


def _time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
