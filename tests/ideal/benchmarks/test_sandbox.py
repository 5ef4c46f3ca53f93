"""Programs that try to get out of the sandbox, or to use more than they may."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ideal.benchmarks import sandbox
from ideal.benchmarks.sandbox import Limits, Outcome, run
from ideal.errors import BadInput
from tests.waiting import HANGS, until


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


def test_packages_can_be_read_wherever_they_lie(tmp_path: Path) -> None:
    """A virtual environment below /tmp, too, where the scratch folder is; and they can't be written."""
    tmp_path.chmod(0o755)  # as root, programs run as a user that nobody is
    (tmp_path / "packaged.py").write_text("value = 7")
    program = f"""
import sys
sys.path.append({str(tmp_path)!r})
import packaged
try:
    open({str(tmp_path / "x")!r}, "w")
except OSError:
    print(packaged.value)
"""
    with sandbox.started(program, Limits(), [str(tmp_path)]) as process:
        assert process.communicate()[0] == b"7\n"


@pytest.mark.parametrize(
    "call",
    [
        "memfd_create(b'x', 0)",
        "shmget(0, 2**20, 0o1600)",
        "syscall(250, 0, -3, 0)",  # keyctl: the session's keyring
        "socket(40, 1, 0)",  # AF_VSOCK
        "socket(16, 3, 0)",  # AF_NETLINK
        "unshare(0x10000000)",  # CLONE_NEWUSER
        "syscall(56, 0x10000011, 0, 0, 0, 0)",  # clone, into a user namespace
        "ptrace(0, 0, 0, 0)",
        "syscall(0x40000000 | 39)",  # getpid by another ABI's number
    ],
)
def test_what_would_lead_past_walls_and_limits_is_denied(call: str) -> None:
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
assert libc.{call} == -1
assert ctypes.get_errno() == 1, ctypes.get_errno()
"""
    assert run(program) == Outcome(True, "passed", "")


def test_threads_and_processes_are_not() -> None:
    """What a filter forbids too much of."""
    program = """
import subprocess, threading
thread = threading.Thread(target=print, args=("thread",))
thread.start()
thread.join()
print(subprocess.run(["echo", "process"], capture_output=True, text=True).stdout)
"""
    assert run(program) == Outcome(True, "passed", "thread\nprocess")


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("import sys\nsys.exit = lambda *a: None\nassert False", False),
        ("import os\nos._exit = os.write = lambda *a: None\nassert False", False),
        ("import builtins\nbuiltins.BaseException = builtins.str = None\nassert False", False),
        ("print('passed', flush=True)\nimport os\nfor fd in range(3, 64):\n  try: os.write(fd, b'0' * 32)\n"
         "  except OSError: pass\nassert False", False),
        ("import sys\nsys.stdout = None", True),
        ("import sys\nsys.stdout.close()", True),
        ("import io, sys\nsys.stdout = sys.stderr = io.StringIO()\nprint('x')", True),
    ],
)  # fmt: skip
def test_the_verdict_is_not_what_a_program_says(program: str, passed: bool) -> None:
    assert run(program).passed is passed


def test_nothing_outlives_a_parent_that_is_killed() -> None:
    seconds = f"6000.{time.time_ns()}"
    program = """
import os
from ideal.benchmarks import sandbox
inside = f"import subprocess, time\\nsubprocess.Popen(['sleep', '{os.environ['SLEEP']}'])\\ntime.sleep(6000)"
sandbox.run(inside, sandbox.Limits(wall_seconds=6000))
"""
    parent = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "SLEEP": seconds})
    until(lambda: running(seconds))
    parent.kill()
    parent.wait()
    gone(seconds)


@pytest.mark.parametrize(
    "command",
    ["mount -t tmpfs x /tmp", "umount /usr", "/usr/sbin/chroot /tmp", "unshare --net true"],
)
def test_no_privileges_are_left(command: str) -> None:
    program = f"""
import subprocess
done = subprocess.run({command.split()}, capture_output=True, text=True)
assert done.returncode, done
"""
    assert run(program).passed


def test_the_first_process_can_not_be_killed() -> None:
    """As root it belongs to another user; else Linux says nothing and lets it live."""
    program = """
import contextlib, os, time
with contextlib.suppress(PermissionError):
    os.kill(1, 9)
time.sleep(0.5)
"""
    assert run(program, Limits(wall_seconds=HANGS)).passed


def test_an_infinite_loop_is_stopped() -> None:
    reason = run("while True: pass", Limits(cpu_seconds=1, wall_seconds=HANGS)).reason
    assert reason.startswith("failed: ended with status"), "not by its processor time"


def test_a_program_that_waits_is_stopped_with_all_it_started() -> None:
    seconds = f"6000.{time.time_ns()}"
    program = f"import subprocess, time\nsubprocess.Popen(['sleep', '{seconds}'])\ntime.sleep(6000)"
    assert run(program, Limits(wall_seconds=1)).reason == "timed out"
    gone(seconds)


def test_a_memory_hog_is_stopped() -> None:
    assert run("x = bytearray(2**30)").reason == "failed: MemoryError"


def test_processes_that_take_much_memory_together_are_stopped() -> None:
    """Each of them less than one may have."""
    program = """
import os, time
for _ in range(6):
    if not os.fork():
        held = bytearray(os.urandom(1) * (150 << 20))
        time.sleep(1000)
time.sleep(1000)
"""
    limits = Limits(wall_seconds=HANGS, memory_bytes=256 << 20, total_bytes=400 << 20)
    assert run(program, limits).reason == "out of memory: more than 400 MiB in all its processes"


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
    until(lambda: not running(argument))


def running(argument: str) -> bool:
    return any(argument in read(entry) for entry in Path("/proc").glob("[0-9]*/cmdline"))


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
