"""Optimisations one after another by one driver on one cluster, and what each leaves behind: a line of JSON a run.

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

from ideal.config_file import load
from service.cluster import connect
from service.run import run
from tests.command import processes_of

SETTLED = 3
"""Seconds in which what a run needed has time to end."""
RAYS_OWN = ("log_monitor.py", "gcs_server")
"""The one keeps up to 200 logs open until it looks whose they are, the other a socket now and then (16 in 27 runs)."""
ENGINE = "vllm_dist_"
"""vLLM's file, of two kilobytes, of an engine that was stopped."""


def left() -> dict[str, int]:
    """What is there now: processes of the cluster, what they and this driver hold, and the bytes of Ray's folder, of
    temporary files, and of shared memory."""
    ours = processes_of(os.environ["RAY_TMPDIR"])
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


def _open_files(process: psutil.Process) -> int:
    try:
        own = any(name in " ".join(process.cmdline()[:3]) for name in RAYS_OWN)
        return 0 if own else process.num_fds()
    except psutil.Error:  # it has just ended
        return 0


if __name__ == "__main__":
    path, runs = Path(sys.argv[1]), int(sys.argv[2])
    connect(load(path))
    for seed in range(runs):
        started = time.monotonic()
        with Path(os.devnull).open("w") as nowhere:
            run(load(path, [f"seed={seed}"]), Console(file=nowhere))
        seconds = round(time.monotonic() - started, 1)
        time.sleep(SETTLED)
        print(json.dumps({"seed": seed, "seconds": seconds, **left()}), flush=True)
