"""Optimisations one after another by one driver on a cluster of its own, and what each leaves behind: a line of JSON a
run.

python -m tests.end_to_end.soak CONFIG RUNS
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import psutil
from rich.console import Console

from ideal.config.file import load
from service.cluster.cluster import connect
from service.runs.run import run
from tests.command import processes_of
from tests.ray_cluster import start_head
from tests.waiting import until

SETTLED = 3
"""Seconds in which nothing ends any more of what a run needed."""
ENDING = ("processes", "shared memory", "temporary files")
RAYS_OWN = ("log_monitor.py", "gcs_server")
"""The one keeps up to 200 logs open until it looks whose they are, the other a socket now and then (16 in 27 runs)."""
ENGINE = "vllm_dist_"
"""vLLM's file, of two kilobytes, of an engine that was stopped."""


def left() -> dict[str, int]:
    """What is there now: processes of the cluster, what they and this driver hold, and the bytes of Ray's folder, of
    temporary files, and of shared memory."""
    ours = [process for process in processes_of(os.environ["RAY_TMPDIR"]) if not _idle(process)]
    folders = [Path("/dev/shm"), Path(os.environ["RAY_TMPDIR"]), Path(os.environ["TMPDIR"])]
    shared, ray, temporary = (
        sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.name.startswith(ENGINE))
        for folder in folders
    )
    return {
        "processes": len(ours),
        "open files": sum(map(_open_files, ours)),
        "driver's open files": psutil.Process().num_fds(),
        "driver's threads": psutil.Process().num_threads(),
        "shared memory": shared,
        "Ray's logs": ray,
        "temporary files": temporary,
    }


def settled() -> dict[str, int]:
    """What is there once nothing ends any more."""
    readings = [left()]

    def same_again() -> bool:
        time.sleep(SETTLED)
        readings.append(left())
        return all(readings[-1][what] == readings[-2][what] for what in ENDING)

    until(same_again, lambda: readings[-2:])
    return readings[-1]


def _idle(process: psutil.Process) -> bool:
    """Ray keeps one or two workers for the next task, as it sees fit; one that a run has left busy is none of them."""
    try:
        return process.cmdline()[:1] == ["ray::IDLE"]
    except psutil.Error:  # it has just ended
        return True


def _open_files(process: psutil.Process) -> int:
    try:
        own = any(name in " ".join(process.cmdline()[:3]) for name in RAYS_OWN)
        return 0 if own else process.num_fds()
    except psutil.Error:  # it has just ended
        return 0


if __name__ == "__main__":
    path, runs = Path(sys.argv[1]), int(sys.argv[2])
    if "RAY_ADDRESS" not in os.environ:
        head = start_head(dict(os.environ), cpus=2)
        again = [sys.executable, "-m", "tests.end_to_end.soak", *sys.argv[1:]]  # Ray reads its token as it is imported
        os.execve(again[0], again, {**head, "RAY_ADDRESS": head["IDEAL_TEST_HEAD"]})
    connect(load(path))
    for seed in range(runs):
        started = time.monotonic()
        with Path(os.devnull).open("w") as nowhere:
            run(load(path, [f"seed={seed}"]), Console(file=nowhere))
        seconds = round(time.monotonic() - started, 1)
        print(json.dumps({"seed": seed, "seconds": seconds, **settled()}), flush=True)
