"""Ray has the time that a busy machine takes, and a failure to start is one line. Only the last test starts one."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray._private import services
from ray._private.utils import validate_socket_filepath

from ideal.config.config import Config
from ideal.errors import BadInput
from service.cluster import own_ray
from service.cluster.cluster import connect

LATE = 31
"""Seconds; Ray waits for 30."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that sleeping moves, and nothing else."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(own_ray, "time", clock)
    return now


@pytest.fixture
def raylet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process of that name, the only one that is seen: other tests' Ray may have its own below this process."""
    shutil.copy("/bin/sleep", tmp_path / "raylet")
    process = subprocess.Popen([tmp_path / "raylet", "1000"])

    def children() -> list[psutil.Process]:
        return [child for child in psutil.Process().children() if child.pid == process.pid]

    seen = SimpleNamespace(Process=lambda: SimpleNamespace(children=children), STATUS_ZOMBIE=psutil.STATUS_ZOMBIE)
    monkeypatch.setattr(own_ray, "psutil", seen)
    yield process
    process.kill()
    process.wait()


def registering(clock: list[float], monkeypatch: pytest.MonkeyPatch, after: float) -> None:
    """A raylet that is known so many seconds after its start, in place of Ray's own question for it."""

    def get_node(address: str, node: str) -> str:
        if clock[0] < after:
            raise RuntimeError("no such node")
        return f"{node} at {address}"

    monkeypatch.setattr(services, "get_node", get_node)


@pytest.mark.usefixtures("raylet")
def test_a_raylet_that_registers_late_is_waited_for(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    registering(clock, monkeypatch, LATE)
    own = services.get_node
    with own_ray.patient_registration():
        assert services.get_node("here", "n") == "n at here"
    assert clock[0] == pytest.approx(LATE, abs=1)
    assert services.get_node is own


def test_a_raylet_that_died_or_hangs_is_not(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, raylet: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setattr(own_ray, "PATIENCE", 2 * LATE)
    registering(clock, monkeypatch, 3 * LATE)
    with own_ray.patient_registration(), pytest.raises(RuntimeError):
        services.get_node("here", "n")
    assert clock[0] == pytest.approx(2 * LATE, abs=1)
    raylet.kill()
    os.waitid(os.P_PID, raylet.pid, os.WEXITED | os.WNOWAIT)  # it stays to be looked at
    before = clock[0]
    with own_ray.patient_registration(), pytest.raises(own_ray.RayletDied):
        services.get_node("here", "n")
    assert clock[0] == before


def test_a_ray_that_does_not_start_is_one_line(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises bare exceptions here, with line breaks in them."""

    def init(**options: Any) -> None:
        raise Exception("The current node timed out\nduring startup.")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(BadInput) as problem:
        connect(config)
    assert "The current node timed out during startup." in problem.value.what
    assert "session_latest/logs" in problem.value.remedy


@pytest.mark.parametrize("deaths", [own_ray.TRIES - 1, own_ray.TRIES])
def test_a_raylet_that_dies_is_started_again(deaths: int, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a failed start leaves is ended, and nothing else."""
    kept = subprocess.Popen(["sleep", "1000"])
    left: list[subprocess.Popen[bytes]] = []

    def init(**options: Any) -> None:
        left.append(subprocess.Popen(["sleep", "1000"]))
        if len(left) <= deaths:
            raise own_ray.RayletDied("it died")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(own_ray, "_close_to_others", lambda: None)
    try:
        if deaths == own_ray.TRIES:
            with pytest.raises(BadInput, match="it died"):
                own_ray.start(1, {})
        else:
            own_ray.start(1, {})
        assert len(left) == own_ray.TRIES
        assert [process.poll() is None for process in [kept, *left]] == [True] + [False] * deaths + [True] * (
            own_ray.TRIES - deaths
        )
    finally:
        for process in [kept, *left]:
            process.kill()
            process.wait()


@pytest.mark.parametrize("depth", [1, 40])
def test_sockets_have_short_paths_wherever_a_batch_system_puts_temporary_files(
    depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Path("/tmp") if depth == 1 else tmp_path / "/".join(["job"] * depth)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(chosen))
    root = own_ray.session_root()
    if depth == 1:
        assert root is None
        return
    assert root
    validate_socket_filepath(f"{root}/session_2026-11-27_15-32-31_123456_4194304/sockets/plasma_store")
    assert Path(root).resolve() == (chosen / "ray").resolve()


@pytest.mark.parametrize("home", ["empty", "with a token", "not writable"])
def test_others_reach_nothing_of_it(home: str, tmp_path: Path) -> None:
    """What Ray makes is writable for all, its ports open to all machines, its token readable in a file."""
    program = """
import pathlib
from service.cluster import environment
environment.prepare()
import ray
from service.cluster import own_ray
own_ray.start(1, {"log_to_driver": False})
print(ray._private.worker._global_node.get_session_dir_path())
ray.get(ray.remote(lambda: None).remote())
ours = [own_ray.psutil.Process(), *own_ray.psutil.Process().children(recursive=True)]
print(*{each.laddr.ip for one in ours for each in one.net_connections() if each.status == "LISTEN"})
print(*(" ".join(each.cmdline()) for each in ours), sep="\\n")
"""
    token = tmp_path / ".ray" / "auth_token"
    if home == "with a token":
        token.parent.mkdir()
        token.write_text("a-token-of-this-test-alone-0123456789")
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets need a short path
    given = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    lies_in = tmp_path if home != "not writable" else Path(os.devnull) / "nobody"
    environment = {**given, "RAY_TMPDIR": folder, "HOME": str(lies_in)}
    try:
        ended = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        session, interfaces, *started = ended.stdout.splitlines()
        assert stat.S_IMODE(Path(session).stat().st_mode) == 0o700, ended.stderr
        assert any("raylet" in each for each in started)
        assert {"127.0.0.1"} == {each.removeprefix("::ffff:") for each in interfaces.split()}
        assert not any("ray-dashboard" in each for each in started), "what shows a page"
        assert token.exists() == (home == "with a token")
        if token.exists():
            assert stat.S_IMODE(token.stat().st_mode) == 0o600
    finally:
        shutil.rmtree(folder)
