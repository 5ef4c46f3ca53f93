"""What breaks under a run: each fault is done to it, and it ends as the run that nothing disturbed.

The table of faults in service/README.md is these tests'.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.command import Command, Ended, same
from tests.end_to_end.tiny_run import make_tree
from tests.ray_cluster import start_head
from tests.waiting import HANGS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("FAULT_KILLS", "2"))
"""Of a driver, at random moments."""
WORKERS = {"sft": "ray::RayTrainWorker", "influence": "ray::InfluenceActor", "benchmark": "ray::Engine"}
"""What a stage's processes are called."""
LATE = 20
"""Seconds until a dead node's successor comes."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One update: every kind of stage runs, and what is trained last hangs on all before it."""
    made = make_tree(tmp_path_factory.mktemp("inputs"), sft_workers=2)
    made["equilibrium"]["iterations"] = 1
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Ended]]:
    """The report of the run that nothing disturbs."""
    command = Command(tmp_path_factory.mktemp("whole"), tree)
    ended = command()
    assert ended.status == 0, ended.output
    yield command.report(), ended
    command.clean()


@pytest.fixture
def command(tmp_path: Path, tree: dict[str, Any]) -> Iterator[Command]:
    made = Command(tmp_path, tree)
    yield made
    made.clean()


def at_work(command: Command, kind: str) -> list[psutil.Process]:
    """A stage's worker processes that have been there for a moment."""
    found = []
    for process in command.processes():
        try:
            if WORKERS[kind] in " ".join(process.cmdline()) and time.time() - process.create_time() > 3:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_driver_killed_again_and_again_repeats_no_stage(
    command: Command, whole: tuple[dict[str, Any], Ended], capsys: pytest.CaptureFixture[str]
) -> None:
    """In D0's influence, then at random moments, which every start puts further into the run; records never go back."""
    moments = random.Random(0)
    process = command.start()
    half = command.storage / "stages" / "influence"
    command.wait_for(lambda: list(half.glob("*/*/*/*")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    command.leaves_nothing_running()
    before = command.records()
    assert {path.parent.parent.name for path in before} >= {"model", "data", "sft", "reference"}
    for _ in range(KILLS):
        process = command.start()
        try:
            process.wait(moments.uniform(0.05, 0.4) * whole[1].seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        command.leaves_nothing_running()
        after = command.records()
        assert {path: after.get(path) for path in before} == before
        before = after
    ended = command()
    assert ended.status == 0, ended.output
    after = command.records()
    assert {path: after[path] for path in before} == before
    same(command.report(), whole[0])
    with capsys.disabled():
        print(f"\n{KILLS + 1} kills left {len(before)} of {len(after)} stages recorded")


def test_a_worker_of_each_stage_is_killed(command: Command, whole: tuple[dict[str, Any], Ended]) -> None:
    """In one run: a worker in the middle of SFT, one of influence, and the engine as it generates."""
    process = command.start()
    for kind in WORKERS:
        command.wait_for(lambda kind=kind: at_work(command, kind), process)[0].kill()
    assert process.wait(HANGS) == 0, command.output.read_text()
    same(command.report(), whole[0])


def test_a_ray_of_the_runs_own_dies(command: Command, whole: tuple[dict[str, Any], Ended]) -> None:
    """In one run: its raylet while SFT works, its GCS while influence does; the command begins again by itself."""
    process = command.start()
    for kind, vital in (("sft", "raylet"), ("influence", "gcs_server")):
        command.wait_for(lambda kind=kind: at_work(command, kind), process)
        recorded = command.records()
        next(each for each in command.processes() if each.name() == vital).kill()
        command.wait_for(lambda vital=vital: f"Ray's {vital} has ended" in command.output.read_text(), process)
    assert process.wait(HANGS) == 0, command.output.read_text()
    after = command.records()
    assert {path: after.get(path) for path in recorded} == recorded, "a recorded stage ran again"
    assert "Traceback" not in command.output.read_text()
    command.leaves_nothing_running()
    same(command.report(), whole[0])


def test_the_gcs_of_a_cluster_dies_that_a_run_has_joined(command: Command, whole: tuple[dict[str, Any], Ended]) -> None:
    """While SFT works; nothing of the run's own stays. Then it goes on, here with a Ray of its own."""
    alone = command.environment
    command.environment = start_head(alone, cpus=2)
    command.environment["RAY_ADDRESS"] = address = command.environment["IDEAL_TEST_HEAD"]
    process = command.start()
    command.wait_for(lambda: at_work(command, "sft"), process)
    recorded = command.records()
    next(each for each in command.processes() if each.name() == "gcs_server").kill()
    assert process.wait(HANGS) == 2, command.output.read_text()
    said = command.output.read_text()
    assert said.splitlines()[-1].startswith("error resources.address: the cluster at ")
    assert f":{address.partition(':')[2]} doesn't answer any more; the same command goes on" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert "rpc_client" not in said
    assert not [each for each in command.processes() if os.getsid(each.pid) == process.pid]
    for each in command.processes():
        each.kill()
    command.leaves_nothing_running()
    command.environment = alone
    ended = command()
    assert ended.status == 0, ended.output
    after = command.records()
    assert {path: after.get(path) for path in recorded} == recorded, "a recorded stage ran again"
    same(command.report(), whole[0])


def test_two_drivers_of_one_run_share_its_stages(command: Command, whole: tuple[dict[str, Any], Ended]) -> None:
    first = command.start()
    command.wait_for(lambda: command.records("model"), first)
    first_output, command.output = command.output, command.output.with_name("second")
    second = command.start()
    assert [first.wait(HANGS), second.wait(HANGS)] == [0, 0], first_output.read_text() + command.output.read_text()
    assert "waiting for it" in command.output.read_text() + first_output.read_text()
    counts = {kind: len(command.records(kind)) for kind in ("sft", "influence", "benchmark")}
    assert counts == {"sft": 2, "influence": 1, "benchmark": 4}
    same(command.report(), whole[0])


@pytest.fixture
def three_nodes(command: Command, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that computes nothing, and two nodes of one CPU each."""
    monkeypatch.setenv("RAY_TMPDIR", command.ray)
    (Path(command.ray) / "ray").mkdir()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    command.environment["RAY_ADDRESS"] = cluster.address
    yield cluster
    cluster.shutdown()


def node_of(cluster: Cluster, process: psutil.Process) -> Any:
    """The node that a worker process runs on."""
    for node in cluster.worker_nodes:
        if any(info.process.pid == process.ppid() for info in node.all_processes["raylet"]):
            return node
    return None


def test_a_node_dies_in_each_stage_and_another_comes_late(
    command: Command, three_nodes: Cluster, whole: tuple[dict[str, Any], Ended]
) -> None:
    """With all that runs on it. SFT needs both nodes, so the run can't end without those that come."""
    process = command.start()
    for kind in WORKERS:
        workers = command.wait_for(lambda kind=kind: at_work(command, kind), process)
        nodes = [node for worker in workers if (node := node_of(three_nodes, worker))]
        three_nodes.remove_node(nodes[0] if nodes else next(iter(three_nodes.worker_nodes)), allow_graceful=False)
        time.sleep(LATE)
        three_nodes.add_node(num_cpus=1)
    assert process.wait(HANGS) == 0, command.output.read_text()
    same(command.report(), whole[0])
