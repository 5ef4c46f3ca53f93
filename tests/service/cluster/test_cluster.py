"""Stages share what the cluster has: threads add up to CPUs, nothing waits for everything, and a wait ends."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile

import psutil
import pytest
import ray

from ideal.config.config import Config, ResourcesConfig
from ideal.errors import BadInput
from service.cluster.cluster import Cluster, Reservation, connect, share
from tests.waiting import HANGS, until


def shared(cpus: int, there: int = 0, **wanted: int) -> Cluster:
    return share(cpus, there, 1, ResourcesConfig(**wanted))


def test_a_machine_without_a_gpu_gives_sft_all_its_cpus() -> None:
    cluster = shared(8)
    assert (cluster.sft_workers, cluster.sft_cpus, cluster.influence_workers) == (1, 8, 8)
    assert cluster.per_worker(cluster.sft_cpus) == {"CPU": 8}
    assert cluster.benchmark_gpus == 0


def test_with_gpus_every_worker_has_one() -> None:
    cluster = shared(32, 4)
    assert (cluster.sft_workers, cluster.influence_workers, cluster.benchmark_gpus) == (4, 4, 1)
    assert cluster.per_worker(8) == {"CPU": 1, "GPU": 1}


def test_no_gpus_can_be_asked_for_where_there_are_some() -> None:
    assert shared(8, 4, gpus=0).per_worker(8) == {"CPU": 8}


MACHINES = [each for each in itertools.product([1, 2, 3, 7, 64], [0, 1, 8], [1, 2, 3]) if each[2] <= each[0]]


@pytest.mark.parametrize(("cpus", "gpus", "nodes"), MACHINES)
@pytest.mark.parametrize("workers", [None, 1, 2, 5])
def test_workers_never_want_more_than_there_is(cpus: int, gpus: int, nodes: int, workers: int | None) -> None:
    """Two processes that use all cores slow each other tenfold."""
    wanted, slots = ResourcesConfig(sft_workers=workers), gpus or cpus
    if (workers or 0) > slots:
        with pytest.raises(BadInput, match="sft_workers"):
            share(cpus, gpus, nodes, wanted)
        return
    cluster = share(cpus, gpus, nodes, wanted)
    assert cluster.sft_workers <= slots
    assert cluster.influence_workers <= slots
    if not gpus:
        assert cluster.sft_workers * cluster.sft_cpus <= cpus
        assert cluster.sft_cpus <= max(1, cpus // nodes)  # a worker lives on one node


@pytest.mark.parametrize(
    ("field", "wanted", "gpus"),
    [("gpus", 2, 1), ("gpus", 1, 0), ("sft_workers", 3, 2), ("sft_workers", 9, 0), ("influence_workers", 9, 0)],
)
def test_more_than_there_is_names_the_field_and_what_there_is(field: str, wanted: int, gpus: int) -> None:
    with pytest.raises(BadInput) as problem:
        shared(8, gpus, **{field: wanted})
    assert problem.value.where == f"resources.{field}"
    assert str(wanted) in problem.value.what
    assert f"has {gpus or (8 if 'workers' in field else 0)}" in problem.value.what


@pytest.mark.parametrize(
    ("cluster", "together"),
    [
        (shared(4, influence_workers=2, sft_workers=2), True),  # 2 actors and an engine of 2 threads
        (shared(4, influence_workers=3, sft_workers=2), False),
        (shared(4), False),
        (shared(8, 2, influence_workers=1), True),
        (shared(8, 2), False),
        (shared(8, 1), False),
        (shared(8, 4, influence_workers=2, benchmark_workers=2), True),
        (shared(8, 4, influence_workers=2, benchmark_workers=2, tensor_parallel=2), False),
        (shared(4, influence_workers=2, sft_workers=1, benchmark_workers=2), False),  # two engines of two threads
    ],
)
def test_influence_and_benchmarks_run_together_where_both_fit(cluster: Cluster, together: bool) -> None:
    assert cluster.together is together


@pytest.mark.parametrize(
    ("cluster", "keep"),
    [
        (shared(2), True),
        (shared(8, 1), False),
        (shared(8, 2), False),
        (shared(8, 2, sft_workers=1, influence_workers=1), True),
        (shared(8, 2, sft_workers=1, influence_workers=2), False),
        (shared(8, 4, sft_workers=2, influence_workers=2, tensor_parallel=2), True),
        (shared(8, 4, sft_workers=3, influence_workers=2, benchmark_workers=2), False),
    ],
)
def test_the_engine_stays_where_no_other_stage_needs_its_gpu(cluster: Cluster, keep: bool) -> None:
    assert cluster.keep_engine is keep


@pytest.mark.usefixtures("ray_session")
def test_a_running_ray_is_taken_as_it_is(config: Config) -> None:
    assert connect(config).cpus == 2


@pytest.mark.usefixtures("ray_session")
def test_a_cluster_is_asked_for_its_nodes_memory(config: Config) -> None:
    """What this machine has says nothing of them."""
    assert connect(config).memory is None
    resources = config.resources.model_copy(update={"address": "auto"})
    assert connect(config.model_copy(update={"resources": resources})).memory == psutil.virtual_memory().total


@pytest.mark.usefixtures("ray_session")
def test_a_wait_for_resources_ends_and_says_what_is_missing() -> None:
    until(lambda: ray.available_resources().get("CPU") == 2, ray.available_resources)
    with pytest.raises(BadInput) as problem, Reservation([{"CPU": 1}] * 3, 1, "influence"):
        pytest.fail("there are only two CPUs")
    assert problem.value.where == "influence"
    assert "needs 3 CPU" in problem.value.what
    assert "2 CPU free" in problem.value.what
    assert "resources.wait_seconds" in problem.value.remedy


@pytest.mark.usefixtures("ray_session")
def test_a_cluster_that_lost_its_nodes_is_not_called_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": False}])
    with pytest.raises(BadInput, match="has lost all its nodes"), Reservation([{"CPU": 1}] * 3, 1, "influence"):
        pytest.fail("there are only two CPUs")


@pytest.mark.usefixtures("ray_session")
def test_a_reservation_is_given_back() -> None:
    for _ in range(3):
        with Reservation([{"CPU": 1}] * 2, HANGS, "influence") as group:
            assert group.bundle_count == 2
    until(lambda: ray.available_resources().get("CPU") == 2, ray.available_resources)


THREE_TASKS = """
import os, sys, ray
from service.cluster.cluster import Cluster, on_one_worker

def process():
    return os.getpid()

ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False, _temp_dir=sys.argv[1], logging_level="ERROR")
cluster = Cluster(cpus=1, gpus=1, nodes=1, sft_workers=1, sft_cpus=1, influence_workers=1)
pids = [on_one_worker(process, cluster=cluster, seconds=int(sys.argv[2]), what="a test") for _ in range(3)]
print(len(set(pids)))
"""


def test_a_gpus_process_ends_with_its_task() -> None:
    """One that went on would hold its GPU's memory, and compute on that GPU whichever it is given next."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-c", THREE_TASKS, folder, str(HANGS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["3"], done.stderr
