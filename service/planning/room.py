"""Whether all stages fit, memory and disk, before the first of them runs.

Disk is what stays (every checkpoint with its averaged weights and its damping, the base model) and the most that is
there besides for a time (what an influence is computed from, or SFT's state and its successor while that is written).
Runs that share a checkpoint count it once, and what is recorded is there already. The examples are left out: rows in
files say little of how long their tokens are, and they are small beside a model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ideal.config.config import Config
from ideal.errors import BadInput
from ideal.model.base import shapes as shapes_of
from ideal.model.files import local_folder
from ideal.training.trainer import number_of_steps
from service.cluster.cluster import Cluster
from service.planning.memory import (
    GIB,
    SUPERVISED,
    WIDTH,
    Sizes,
    pass_memory,
    reference_memory,
    sft_memory,
    solve_memory,
)
from service.planning.plan import Plan, estimate, plan

PLANNED = {"model", "sft", "influence", "resources", "method", "domains"}
"""Sections that a plan depends on; runs that differ elsewhere have the same."""


def check_runs(configs: Sequence[Config], machine: Cluster, there: Iterable[Path]) -> tuple[int, int]:
    """Check that runs fit, one after another, with all that they leave.

    Args:
        there: folders of the runs' recorded checkpoints.

    Returns:
        bytes still needed on disk, and free.

    Raises:
        BadInput: one doesn't, with its first stage that is too large; or the disk is too small for all of them.
    """
    plans: dict[str, Plan | None] = {}
    stay: dict[str, int] = {}
    scratch = 0
    for config in configs:
        key = config.model_dump_json(include=PLANNED)
        if key not in plans:
            plans[key] = _planned(config, machine)
        found = plans[key]
        if found:
            stay |= dict.fromkeys(checkpoints(config), found.checkpoint)
            scratch = max(scratch, found.state if _keeps_states(config) else 0, _influence_scratch(config, found))
    return check_disk(configs[0], sum(stay.values()), scratch, there)


def check_fidelity(config: Config, machine: Cluster, there: Iterable[Path]) -> None:
    """Check that the retrainings fit, and every solver's influence, each in one worker.

    Args:
        there: folders of the recorded trainings that keep their weights.

    Raises:
        BadInput: one doesn't, or the disk is too small for the checkpoints that stay.
    """
    shapes = shapes_of(config.model)
    if shapes is None:
        return
    found = estimate(config, shapes, machine)
    sizes = Sizes.of(shapes, config.influence.layers, config.sft.lora)
    _check_retraining(config, sizes, found)
    for name in config.fidelity.solvers:
        compared = config.model_copy(update={"influence": config.compared(name)})
        sizes = Sizes.of(shapes, compared.influence.layers, config.sft.lora)
        needed = max(pass_memory(compared, sizes, 1, SUPERVISED), solve_memory(compared, sizes, SUPERVISED))
        if needed > found.available:
            raise _too_large(f"fidelity.solvers.{name}", "its influence", needed, found.available)
    check_disk(config, config.fidelity.seeds * found.checkpoint, 0, there)


def check_disk(config: Config, stay: int, scratch: int, there: Iterable[Path]) -> tuple[int, int]:
    """Bytes still needed, and free where a config's stages go.

    Args:
        stay, scratch: bytes of checkpoints, and the most that is there beside them for a time.
        there: folders that hold a part of what stays; the base model is there, too, if there are any.

    Raises:
        BadInput: there is less.
    """
    kept = list(there)
    held = sum(file.stat().st_size for folder in kept for file in folder.rglob("*") if file.is_file())
    needed = max(0, stay - held) + scratch + (0 if kept else base_bytes(config))
    free = shutil.disk_usage(_existing(config.root)).free
    if needed > free:
        raise BadInput(
            "storage",
            f"{config.root} has {free / GIB:.1f} GiB free, {needed / GIB:.1f} GiB are needed "
            f"({(needed - scratch) / GIB:.1f} for models, {scratch / GIB:.1f} for a time)",
            "free some space, set storage elsewhere, lower influence.blocks or track fewer layers",
        )
    return needed, free


def checkpoints(config: Config) -> set[str]:
    """Names of the SFTs that a run keeps if no mixture is rejected; those that runs share have one name."""
    weights = config.model_dump(mode="json", include={"model", "domains", "sft", "seed"})
    shared = json.dumps([weights, config.influence.averaged], sort_keys=True)
    own = config.model_dump_json(exclude={"resources", "tracking", "storage", "benchmarks"})
    joint, final = f"joint {shared}", f"final {own}"
    if config.method == "equilibrium":
        return {joint, *(f"{n} {own}" for n in range(config.equilibrium.iterations))}
    alone = {f"{domain.name} {shared}" for domain in config.domains}
    found = {
        "base": set[str](),
        "joint": {joint},
        "leave_one_out": {f"without {each}" for each in alone},  # the chosen one is one of these
        "specific": {f"{config.methods.domain} {shared}"},
        "merge": {*alone, final},
        "doremi": {joint, final},
    }
    return found.get(config.method, {final})


def base_bytes(config: Config) -> int:
    """Of the base model's stage, as far as it isn't made of links."""
    origin = local_folder(config.model)
    if origin:
        linked = _existing(config.root).stat().st_dev == origin.resolve().stat().st_dev
        return 0 if linked else sum(file.stat().st_size for file in origin.glob("*.safetensors"))
    shapes = shapes_of(config.model)
    if shapes is None:
        return 0
    written = getattr(shapes, "dtype", None)
    width = WIDTH["fp32"] if config.model.made else written.itemsize if written else WIDTH["bf16"]
    return int(Sizes.of(shapes, config.influence.layers).parameters * width)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above that is there."""
    return folder if folder.exists() else _existing(folder.parent)


def _planned(config: Config, machine: Cluster) -> Plan | None:
    """A run's plan; None where only a hub that doesn't answer knows the model."""
    shapes = shapes_of(config.model)
    if shapes is None:
        return None
    found = plan(config, shapes, machine)
    sizes = Sizes.of(shapes, config.influence.layers, config.sft.lora)
    if config.method == "regmix":
        _check_retraining(config, sizes, found)
    alone = _alone(config, sizes)
    if alone.get(config.method, 0) > found.sft_available:
        raise _too_large("method", f"{config.method}, by one worker,", alone[config.method], found.sft_available)
    return found


def _alone(config: Config, sizes: Sizes) -> Mapping[str, int]:
    """Bytes of the worker that a method besides SFT has, by method: it trains, or reads several models, by itself."""
    width, whole = WIDTH[config.sft.precision], sft_memory(config, sizes, SUPERVISED)
    trained = WIDTH["fp32"] if config.sft.lora else width
    return {
        "doremi": whole + sizes.parameters * width,
        "doge": whole,
        "merge": reference_memory(config, sizes, SUPERVISED) + len(config.domains) * sizes.parameters * trained,
    }


def _check_retraining(config: Config, sizes: Sizes, found: Plan) -> None:
    """A retraining is one process of an influence worker's size, which forgets no activations."""
    resources = config.resources.model_copy(update={"gradient_checkpointing": False})
    needed = sft_memory(config.model_copy(update={"resources": resources}), sizes, SUPERVISED)
    if needed > found.available:
        raise _too_large("model.source", "a retraining", needed, found.available)


def _influence_scratch(config: Config, found: Plan) -> int:
    return found.scratch if config.method == "equilibrium" else 0


def _keeps_states(config: Config) -> bool:
    """Whether SFT is long enough to leave a state on its way; taken to be where the examples aren't counted yet."""
    sizes = [domain.volume or domain.train.size for domain in config.domains]
    known = [size for size in sizes if size is not None]
    steps = number_of_steps(sum(known), config.sft)
    return len(known) < len(sizes) or steps > config.resources.checkpoint_steps


def _too_large(where: str, what: str, needed: int, available: int) -> BadInput:
    return BadInput(
        where,
        f"{what} needs {needed / GIB:.1f} GiB in each worker, which has {available / GIB:.1f} GiB",
        "take a smaller model, fewer resources.batch_tokens or resources.influence_workers, or a larger device",
    )
