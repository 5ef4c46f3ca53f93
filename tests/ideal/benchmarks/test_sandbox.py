"""Programs that try to get out of the sandbox, or to use more than they may."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ideal.benchmarks import sandbox
from ideal.benchmarks.sandbox import Limits, run
from ideal.errors import BadInput


def test_ordinary_code_passes_with_its_output() -> None:
    outcome = run(
        "import collections, dataclasses, heapq, json, math, re, typing\n"
        "open('notes', 'w').write('x' * 1000)\n"
        "assert len(open('notes').read()) == 1000\n"
        "print('sum', sum(range(10)))"
    )
    assert outcome.passed
    assert outcome.output == "sum 45"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 + 1 == 3, 'no'", "failed: no"),
        ("def f(:", "failed: invalid syntax (<string>, line 1)"),
        ("import sys\nsys.exit(0)", "failed: 0"),
        ("import os\nos._exit(0)", "failed: ended with status 0"),
        ("input()", "failed: EOF when reading a line"),
    ],
)
def test_code_that_does_not_run_to_its_end_fails(program: str, reason: str) -> None:
    outcome = run(program)
    assert not outcome.passed
    assert outcome.reason == reason


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield server.getsockname()[1]
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_listener_on_loopback_is_out_of_reach(listener: int) -> None:
    program = f"import socket\nsocket.create_connection(('127.0.0.1', {listener}), timeout=2)"
    assert run(program).reason == "failed: [Errno 101] Network is unreachable"


def test_a_unix_socket_is_out_of_reach(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{tmp_path}")
        server.listen()
        program = f"import socket\nsocket.socket(socket.AF_UNIX).connect('\\0{tmp_path}')"
        assert run(program).reason == "failed: [Errno 111] Connection refused"


@pytest.fixture
def secret() -> Iterator[Path]:
    path = Path.home() / f".sandbox-test-{time.time_ns()}"
    path.write_text("secret")
    yield path
    path.unlink()


def test_home_and_this_projects_files_are_out_of_sight(secret: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("secret")
    for path in (secret, tmp_path / "data", Path(__file__)):
        outcome = run(f"print(open({str(path)!r}).read())")
        assert not outcome.passed
        assert "No such file or directory" in outcome.reason


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "secret")
    outcome = run("import os\nprint(os.getcwd(), sorted(os.environ))")
    assert outcome.output == "/tmp ['HOME', 'LANG', 'PATH', 'PYTHONHASHSEED']"


def test_nothing_but_the_scratch_folder_can_be_written() -> None:
    program = """
import os
for path in ("/x", "/usr/x", "/etc/x", "/dev/x", os.path.dirname(os.__file__) + "/x"):
    try:
        open(path, "w")
    except OSError:
        continue
    raise SystemExit(path)
"""
    assert run(program).passed


@pytest.mark.parametrize(
    "command",
    ["mount -t tmpfs x /tmp", "umount /usr", "/usr/sbin/chroot /tmp", "unshare --net true", "kill -9 1"],
)
def test_no_privileges_are_left(command: str) -> None:
    program = f"""
import subprocess
done = subprocess.run({command.split()}, capture_output=True, text=True)
assert done.returncode, done
"""
    assert run(program).passed


def test_an_infinite_loop_is_stopped() -> None:
    started = time.monotonic()
    assert not run("while True: pass", Limits(cpu_seconds=1, wall_seconds=60)).passed
    assert time.monotonic() - started < 30


def test_a_program_that_waits_is_stopped_with_all_it_started() -> None:
    seconds = f"60.{time.time_ns()}"
    program = f"import subprocess, time\nsubprocess.Popen(['sleep', '{seconds}'])\ntime.sleep(60)"
    assert run(program, Limits(wall_seconds=1)).reason == "timed out"
    gone(seconds)


def test_a_memory_hog_is_stopped() -> None:
    assert run("x = bytearray(2**30)").reason == "failed: MemoryError"


def test_a_fork_bomb_is_stopped_and_leaves_nothing() -> None:
    seconds = f"60.{time.time_ns()}"
    program = f"""
import subprocess
started = 0
try:
    for _ in range(100):
        subprocess.Popen(["sleep", "{seconds}"])
        started += 1
except OSError:
    raise SystemExit(started)
"""
    outcome = run(program, Limits(processes=16))
    assert 0 < int(outcome.reason.removeprefix("failed: ")) < 16
    gone(seconds)


def gone(argument: str) -> None:
    """Wait until no process of this machine has the argument: the kernel kills them, but not in no time."""
    deadline = time.monotonic() + 5
    while alive := [entry for entry in Path("/proc").glob("[0-9]*/cmdline") if argument in read(entry)]:
        assert time.monotonic() < deadline, alive


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("file = open('x', 'wb')\nwhile True: file.write(b'x' * 2**20)", "File too large"),
        ("for n in range(100): open(str(n), 'wb').write(b'x' * 2**20)", "No space left on device"),
        ("for n in range(10_000): open(str(n), 'wb').close()", "No space left on device"),
    ],
)
def test_a_disk_filler_is_stopped(program: str, reason: str) -> None:
    assert reason in run(program).reason


def test_endless_output_is_stopped_and_cut() -> None:
    outcome = run("while True: print('x' * 2**16)")
    assert not outcome.passed
    assert len(outcome.output) <= sandbox.OUTPUT_SHOWN


def test_nothing_runs_on_a_machine_that_refuses_namespaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    monkeypatch.setattr(sandbox, "_command", lambda *_: ["sh", "-c", "echo unshare: Operation not permitted; exit 1"])
    sandbox.require.cache_clear()
    try:
        with pytest.raises(BadInput, match="Operation not permitted") as caught:
            run(f"open({str(marker)!r}, 'w')")
    finally:
        sandbox.require.cache_clear()
    assert caught.value.where == "allow_code_execution"
    assert not marker.exists()


def test_a_process_with_a_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The walls are asked for on the command line; without the one for the network the check must fail."""
    inner = sandbox._command
    monkeypatch.setattr(sandbox, "_command", lambda *given: [part for part in inner(*given) if part != "--net"])
    if len(socket.if_nameindex()) == 1:
        pytest.skip("this machine itself has no network but loopback")
    sandbox.require.cache_clear()
    try:
        with pytest.raises(BadInput, match="wall off"):
            run("pass")
    finally:
        sandbox.require.cache_clear()
