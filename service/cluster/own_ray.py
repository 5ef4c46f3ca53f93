"""A Ray of this process's own: it has minutes to start, short paths for its sockets, and nothing for others to reach.

It has no dashboard, which is eleven processes and a gigabyte that nobody looks at. Where one of its own processes ends
before it does, Ray itself waits for it, or ends the driver after a minute; here the command begins again at once.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants, services, worker

from ideal.errors import BadInput
from service.cluster import interrupts, joined_ray
from service.errors import in_a_line

PATIENCE = 600
"""Seconds for Ray's processes to start in: a busy machine takes a minute for what an idle one does in three seconds."""
VITAL = ("raylet", "gcs_server")
TRIES = 3
"""Starts before it is given up: now and then a raylet ends before it is known."""
SETTINGS = {
    ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",  # its ports are the loopback interface's alone
    "RAY_gcs_server_port_wait_time_s": str(PATIENCE),
    "RAY_worker_register_timeout_seconds": str(PATIENCE),
    "RAY_agent_register_timeout_ms": str(PATIENCE * 1000),
}
LOOK = 0.5
"""Seconds between looks at whether Ray lives."""
_looking = threading.Lock()  # or on its way down
LONGEST_ROOT = 107 - len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
"""Bytes; a socket's path may have 107."""


def start(cpus: int, options: dict[str, Any]) -> None:
    """Start a Ray on this machine that ends with this process.

    Args:
        options: further ones of ``ray.init``.

    Raises:
        BadInput: one of its processes ended in each of ``TRIES`` starts, or took longer than ``PATIENCE``.
    """
    system = {
        "num_workers_soft_limit": cpus,  # idle processes; else they go whenever actors work
        "health_check_failure_threshold": 100,  # this machine is the only node: it may be slow, never lost
    }
    for left in reversed(range(TRIES)):
        before = psutil.Process().children()
        try:
            with _settings(), patient_registration():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    _temp_dir=session_root(),
                    _system_config=system,
                    **options,
                )
            _close_to_others()
            threading.Thread(target=_watch, daemon=True).start()
            return
        except RayletDied as error:
            _end(before)
            if not left:
                raise _cannot_start(error) from None
        except Exception as error:  # Ray raises bare ones, too
            raise _cannot_start(error) from None


def stop() -> None:
    """End the Ray that this process has started, or leave the one that it has joined.

    What failed because it was dead begins again, or ends the command.
    """
    begin_again_if_dead()
    joined_ray.wait_while_gone()
    with _looking:
        ray.shutdown()


def begin_again_if_dead() -> None:
    """End this process, and run its command again, if what Ray can't do without has ended."""
    node: Any = worker._global_node
    dead = [name for name, _ in node.dead_processes() if name in VITAL] if node else []
    if dead:
        logs = Path(node.get_logs_dir_path()).resolve()
        interrupts.begin_again(f"Ray's {dead[0]} has ended (its logs: {logs}); the command begins again")


def _watch() -> None:
    while True:
        with _looking:
            if not ray.is_initialized():
                return
            begin_again_if_dead()
        time.sleep(LOOK)


@contextmanager
def _settings() -> Iterator[None]:
    """For Ray's processes, which inherit them, and not for what this process starts besides."""
    before = os.environ.copy(), ray_constants.ENABLE_RAY_CLUSTER
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    ray_constants.ENABLE_RAY_CLUSTER = False  # which was read as it was imported
    try:
        yield
    finally:
        for name in SETTINGS.keys() - before[0].keys():
            del os.environ[name]
        ray_constants.ENABLE_RAY_CLUSTER = before[1]


class RayletDied(Exception):
    """Another start may succeed; waiting won't. Ray itself goes on asking for it."""


def _close_to_others() -> None:
    """Ray lets every user of the machine write into its session's folder, and read the token that opens its ports."""
    node: Any = worker._global_node
    Path(node.get_session_dir_path()).chmod(0o700)
    with suppress(OSError):  # a token that the environment gives is in no file
        (Path.home() / ".ray" / "auth_token").chmod(0o600)


def _cannot_start(error: Exception) -> BadInput:
    return BadInput(
        "resources.address",
        f"Ray doesn't start on this machine: {in_a_line(error)}",
        f"its logs are in {_ray_folder()}/session_latest/logs; or give the address of a Ray that runs",
    )


def _end(before: list[psutil.Process]) -> None:
    """End what a start that failed leaves: Ray itself ends it with this process only."""
    started = [child for child in psutil.Process().children() if child not in before]
    for child in started:
        child.kill()
    psutil.wait_procs(started)


@contextmanager
def patient_registration() -> Iterator[None]:
    """Wait up to ``PATIENCE`` for a raylet that lives: Ray gives up after 30 s, which no setting changes."""
    get_node = services.get_node

    def patient(*arguments: Any) -> Any:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return get_node(*arguments)  # type: ignore[no-untyped-call]
            except RuntimeError:
                if not _raylet_lives():
                    raise RayletDied("its raylet ended before it was known") from None
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    services.get_node = patient
    try:
        yield
    finally:
        services.get_node = get_node


def _ray_folder() -> Path:
    """Where Ray makes its sessions' folders if it isn't told otherwise."""
    return Path(get_default_ray_temp_dir())  # type: ignore[no-untyped-call]


def _raylet_lives() -> bool:
    """Whether a raylet that this process has started runs."""
    children = psutil.Process().children()
    return any(child.name() == "raylet" and child.status() != psutil.STATUS_ZOMBIE for child in children)


def session_root() -> str | None:
    """The folder that Ray makes its session's in, sockets included; None leaves the choice to Ray.

    Where that is too deep for a socket's path (batch systems set a long TMPDIR), a short link leads there.
    """
    chosen = _ray_folder()
    if len(os.fsencode(chosen)) <= LONGEST_ROOT:
        return None
    chosen.mkdir(parents=True, exist_ok=True)
    link = interrupts.temporary_folder(interrupts.SHORT) / "ray"
    link.symlink_to(chosen)
    return str(link)
