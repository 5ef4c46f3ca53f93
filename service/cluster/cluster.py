"""What the cluster has, what each stage takes of it, and a wait for it that ends and says why.

Without an address, a Ray of its own is started on this machine and ends with the run. Threads add up to the CPUs:
two processes that each use all cores slow each other tenfold.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ideal.config.config import Config, ResourcesConfig
from ideal.errors import BadInput
from service.cluster import joined_ray
from service.cluster.own_ray import start
from service.errors import in_a_line

T = TypeVar("T")


@dataclass(frozen=True)
class Cluster:
    """Ray's resources, and how the stages share them.

    Attributes:
        sft_workers: data-parallel training workers, each with one GPU or ``sft_cpus`` CPUs.
        influence_workers: actors, each with one GPU or one CPU.
        benchmark_workers: vLLM engines.
        tensor_parallel: GPUs of each, where there are GPUs.
        shared: by several runs, so that none may hold what it doesn't use.
        memory: bytes of the smallest GPU, or without GPUs of the smallest node; None: this machine's.
    """

    cpus: int
    gpus: int
    nodes: int
    sft_workers: int
    sft_cpus: int
    influence_workers: int
    shared: bool = False
    benchmark_workers: int = 1
    tensor_parallel: int = 1
    memory: int | None = None

    @property
    def benchmark_gpus(self) -> int:
        """Of all engines; 0 on CPU."""
        return self.benchmark_workers * self.tensor_parallel if self.gpus else 0

    @property
    def benchmark_cpus(self) -> int:
        """Of one engine, while it works."""
        return max(1, self.sft_cpus // self.benchmark_workers)

    @property
    def together(self) -> bool:
        """Whether influence and benchmarks fit beside each other."""
        if self.gpus:
            return self.gpus >= self.influence_workers + self.benchmark_gpus
        return self.cpus >= self.influence_workers + self.benchmark_workers * self.benchmark_cpus

    @property
    def keep_engine(self) -> bool:
        """Whether the benchmark engine may stay while SFT runs. On CPU it holds no CPU while it is idle."""
        others = max(self.sft_workers, self.influence_workers)
        return not self.gpus or (not self.shared and self.gpus >= others + self.benchmark_gpus)

    def per_worker(self, cpus: int) -> dict[str, float]:
        """Ray resources of one worker."""
        return {"CPU": 1, "GPU": 1} if self.gpus else {"CPU": cpus}

    def describe(self) -> str:
        return f"{self.nodes} node{'s' * (self.nodes > 1)}, {self.cpus} CPUs, {self.gpus} GPUs"


def share(cpus: int, gpus: int, nodes: int, wanted: ResourcesConfig) -> Cluster:
    """Divide a cluster's resources among the stages.

    Raises:
        BadInput: it has fewer than the config asks for.
    """
    if (wanted.gpus or 0) > gpus:
        raise BadInput(
            "resources.gpus",
            f"asks for {wanted.gpus} GPUs, the cluster has {gpus}",
            "lower it, or give resources.address of a cluster that has them",
        )
    if wanted.gpus is not None:
        gpus = wanted.gpus
    slots = gpus or cpus
    workers = wanted.sft_workers or max(1, gpus)
    influence = wanted.influence_workers or (gpus or min(8, cpus))
    engines = wanted.benchmark_workers * (wanted.tensor_parallel if gpus else 1)
    for name, count in (("sft_workers", workers), ("influence_workers", influence), ("benchmark_workers", engines)):
        if count > slots:
            kind = "GPUs" if gpus else "CPUs"
            raise BadInput(f"resources.{name}", f"asks for {count}, the cluster has {slots} {kind}", "lower it")
    sft_cpus = 1 if gpus else max(1, cpus // nodes // workers) if workers <= cpus // nodes else 1
    return Cluster(
        cpus,
        gpus,
        nodes,
        workers,
        sft_cpus,
        influence,
        benchmark_workers=wanted.benchmark_workers,
        tensor_parallel=wanted.tensor_parallel,
    )


def connect(config: Config) -> Cluster:
    """Connect to Ray, or start one here, and check that it has what the config asks for.

    Raises:
        BadInput: no Ray at the address, too few resources, or storage that isn't shared by all nodes.
    """
    address = address_of(config)
    if not ray.is_initialized():
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address:
            _join(address, options)
        else:
            start(own_cpus(), options)
    total = ray.cluster_resources()  # type: ignore[no-untyped-call]
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    cluster = share(int(total.get("CPU", 1)), int(total.get("GPU", 0)), len(nodes), config.resources)
    names = [node["NodeID"] for node in nodes]
    if len(nodes) > 1:
        _check_shared(config.root, names)
    return replace(cluster, memory=_smallest(names, cluster.gpus > 0)) if address else cluster


def address_of(config: Config) -> str | None:
    """Of the cluster that runs a config; None: a Ray of its own on this machine."""
    return config.resources.address or os.environ.get("RAY_ADDRESS")


def _join(address: str, options: dict[str, Any]) -> None:
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BadInput(
            "resources.address",
            f"no Ray answers at {address}: {in_a_line(error)}",
            "check `ray status`, or leave the address out",
        ) from None
    joined_ray.watch()


def local(config: Config) -> Cluster:
    """The cluster that ``connect`` would start on this machine.

    Raises:
        BadInput: this machine has fewer than the config asks for.
    """
    import torch

    return share(own_cpus(), torch.cuda.device_count(), 1, config.resources)


def own_cpus() -> int:
    """The CPUs that this process may use (`taskset` and batch systems give it fewer than there are)."""
    return len(os.sched_getaffinity(0))


class Reservation:
    """Resources for several workers at once, waited for with a limit; a context manager.

    Args:
        bundles: Ray resources of each worker.
        what: the stage, for the error.

    Raises:
        BadInput: they weren't free within ``seconds``.
    """

    def __init__(self, bundles: list[dict[str, float]], seconds: int, what: str) -> None:
        self.bundles, self.seconds, self.what = bundles, seconds, what

    def __enter__(self) -> PlacementGroup:
        group: PlacementGroup = placement_group(self.bundles)
        self.group = group
        if not self.group.wait(self.seconds):
            remove_placement_group(self.group)
            needed = {k: sum(b.get(k, 0) for b in self.bundles) for b in self.bundles for k in b}
            alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
            available = ray.available_resources()  # type: ignore[no-untyped-call]
            free = _list({k: available.get(k, 0) for k in needed})
            has = f"has {free} free" if alive else "has lost all its nodes"
            raise BadInput(
                self.what,
                f"needs {_list(needed)}; after {self.seconds} s the cluster {has}",
                "wait for other jobs, add nodes, or raise resources.wait_seconds" if alive else "see `ray status`",
            )
        return group

    def __exit__(self, *exception: object) -> None:
        remove_placement_group(self.group)


def on_one_worker(
    work: Callable[..., T],
    *arguments: Any,
    cluster: Cluster,
    seconds: int,
    what: str,
    cpus: int | None = None,
    retries: int = 3,
) -> T:
    """What ``work(*arguments)`` returns in a Ray task on one worker.

    A GPU's process ends with the task: else it would hold the GPU's memory, and go on with this GPU when it is given
    another. Ray does so by itself only where a task asks for its GPU in its decorator.

    Args:
        seconds, what: as ``Reservation`` has them.
        cpus: of the worker, where there are no GPUs. Default: those of an SFT worker.
        retries: where its process dies.

    Raises:
        BadInput: the resources weren't free in time.
    """
    bundle = cluster.per_worker(cpus or cluster.sft_cpus)
    with Reservation([bundle], seconds, what) as reserved:
        placed = ray.remote(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_calls=1 if cluster.gpus else 0,
            max_retries=retries,
            scheduling_strategy=PlacementGroupSchedulingStrategy(reserved),
        )(work)
        found: T = ray.get(placed.remote(*arguments))
        return found


def _list(resources: dict[str, float]) -> str:
    return ", ".join(f"{count:g} {name}" for name, count in resources.items())


def _smallest(nodes: list[str], gpus: bool) -> int | None:
    """Bytes of the smallest GPU of these nodes, or of the smallest node; None where none of them says."""

    @ray.remote(num_cpus=0, max_calls=1)  # its process ends, and holds no memory of the GPU
    def memory() -> int:
        import psutil
        import torch

        if not gpus:
            return int(psutil.virtual_memory().total)
        devices = range(torch.cuda.device_count())
        return min((int(torch.cuda.get_device_properties(n).total_memory) for n in devices), default=0)

    calls = [
        memory.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes
    ]
    return min((bytes_ for bytes_ in ray.get(calls) if bytes_), default=None)


def _check_shared(root: Path, nodes: list[str]) -> None:
    """A file written here must be seen on every node."""
    root.mkdir(parents=True, exist_ok=True)
    probe = root / f".shared-{uuid.uuid4().hex}"
    probe.touch()

    @ray.remote(num_cpus=0)
    def sees(path: str) -> bool:
        return os.path.exists(path)

    try:
        calls = [
            sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(str(probe))
            for node in nodes
        ]
        missing = [node for node, seen in zip(nodes, ray.get(calls), strict=True) if not seen]
    finally:
        probe.unlink()
    if missing:
        raise BadInput(
            "storage", f"{root} isn't shared: {len(missing)} of {len(nodes)} nodes don't see it", "use a shared folder"
        )
