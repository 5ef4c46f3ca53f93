"""An interrupt is one line and an exit status, whatever the process does, and nothing that it started stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from service.cluster.interrupts import GOES_ON, RESTARTS
from tests.waiting import until

BUSY = {
    "waits for a thread": "ThreadPoolExecutor(1).submit(threading.Event().wait).result()",
    "computes": "while True: pass",
    "lets no other thread run": "ctypes.PyDLL(None).sleep(10000)",
    "starts processes": "while not time.sleep(0.02): subprocess.Popen(['sleep', '1000'], preexec_fn=os.getpid)",
    "catches everything": """
while True:
    try:
        threading.Event().wait(1)
    except BaseException:
        print('caught')
""",
}
SCRIPT = """
import ctypes, os, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from service.cluster import interrupts

interrupts.guard(["run"])
print(interrupts.temporary_folder())
signal.signal(signal.SIGTERM, lambda *_: print("a library's handler ran", file=sys.stderr))
child = "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
child += "subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], stdin=-1); "
child += "print(1, flush=True); sys.stdin.read()"
subprocess.Popen([sys.executable, "-c", child], stdin=-1, stdout=-1).stdout.readline()
print("ready", flush=True)
"""


class Started:
    """A script that has started processes of its own, and theirs, and does something then."""

    def __init__(self, doing: str, marker: str) -> None:
        self.marker = marker
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT + doing],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "IDEAL_TEST_MARKER": marker},
            text=True,
        )
        assert self.process.stdout
        self.folder = Path(self.process.stdout.readline().strip())
        assert self.process.stdout.readline() == "ready\n"

    @property
    def living(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("IDEAL_TEST_MARKER") == self.marker
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def marker(tmp_path: Path) -> str:
    return str(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("doing", BUSY)
def test_one_line_a_status_and_no_process(doing: str, number: signal.Signals, marker: str) -> None:
    started = Started(BUSY[doing], marker)
    until(lambda: len(started.living) >= 4, lambda: started.living)
    assert started.folder.is_dir()
    for _ in range(3):
        started.process.send_signal(number)
    _, errors = started.process.communicate()
    assert (started.process.returncode, errors) == (128 + number, f"{GOES_ON}\n")
    psutil.wait_procs(started.living)
    assert not started.living
    assert not started.folder.exists()


def test_a_closed_terminal_can_be_told_nothing(marker: str) -> None:
    started = Started(BUSY["waits for a thread"], marker)
    assert started.process.stderr
    started.process.stderr.close()
    started.process.send_signal(signal.SIGHUP)
    assert started.process.wait() == 128 + signal.SIGHUP
    psutil.wait_procs(started.living)


@pytest.mark.parametrize(
    ("end", "status", "line"),
    [("sys.exit(7)", 7, ""), ("", 0, ""), ("os.kill(os.getpid(), signal.SIGKILL)", 137, "killed by SIGKILL\n")],
)
def test_without_an_interrupt_the_status_is_the_commands_own(marker: str, end: str, status: int, line: str) -> None:
    started = Started(end, marker)
    _, errors = started.process.communicate()
    assert (started.process.returncode, errors) == (status, line)
    assert not started.folder.exists()


def test_what_asks_for_it_begins_again_so_often_and_no_more(marker: str, tmp_path: Path) -> None:
    """Each time after the end of all that was started before; an interrupt still ends it."""
    starts = tmp_path / "starts"
    doing = f"""
with open({str(starts)!r}, "a") as file:
    print("start", file=file)
interrupts.begin_again("Ray's raylet has ended")
"""
    started = Started(doing, marker)
    _, errors = started.process.communicate()
    assert (started.process.returncode, errors) == (1, "Ray's raylet has ended\n" * (RESTARTS + 1))
    assert starts.read_text() == "start\n" * (RESTARTS + 1)
    psutil.wait_procs(started.living)
    assert not started.living


def test_what_gives_up_ends_as_bad_input_does(marker: str) -> None:
    started = Started("interrupts.give_up('the cluster is gone')", marker)
    _, errors = started.process.communicate()
    assert (started.process.returncode, errors) == (2, "the cluster is gone\n")
    psutil.wait_procs(started.living)
    assert not started.living


def test_a_command_that_began_again_can_be_interrupted(marker: str, tmp_path: Path) -> None:
    doing = f"""
import pathlib
if not pathlib.Path({str(tmp_path / "once")!r}).exists():
    pathlib.Path({str(tmp_path / "once")!r}).touch()
    interrupts.begin_again("Ray's raylet has ended")
pathlib.Path({str(tmp_path / "twice")!r}).touch()
time.sleep(1000)
"""
    started = Started(doing, marker)
    until((tmp_path / "twice").exists)
    started.process.send_signal(signal.SIGTERM)
    _, errors = started.process.communicate()
    assert (started.process.returncode, errors) == (143, f"Ray's raylet has ended\n{GOES_ON}\n")
    psutil.wait_procs(started.living)
    assert not started.living


def test_killed_itself_it_takes_all_along(marker: str) -> None:
    started = Started(BUSY["catches everything"], marker)
    started.process.kill()
    psutil.wait_procs(started.living)
    assert not started.living


def test_what_a_library_starts_can_be_interrupted(marker: str) -> None:
    """Ray ends its processes by SIGTERM, which must not be blocked in them."""
    started = Started(
        "p = subprocess.Popen(['sleep', '1000'], preexec_fn=os.getpid); p.terminate(); print(p.wait())",
        marker,
    )
    assert started.process.communicate()[0] == f"-{signal.SIGTERM}\n"


@pytest.mark.parametrize(
    ("before", "command", "sent", "status", "line"),
    [
        ("", "compare", [signal.SIGINT], 130, GOES_ON),
        ("", "plan", [signal.SIGTERM], 143, "stopped"),
        ("signal.signal(signal.SIGHUP, signal.SIG_IGN)", "run", [signal.SIGHUP, signal.SIGINT], 130, GOES_ON),
        ("", "submit", [signal.SIGHUP], 129, "the job goes on"),
    ],
    ids=["compare", "plan", "run under nohup", "submit"],
)
def test_what_it_says_is_true_of_the_command(
    before: str, command: str, sent: list[signal.Signals], status: int, line: str
) -> None:
    script = f"""
import signal, threading
{before}
from service.cluster import interrupts
interrupts.guard([{command!r}])
if {command!r} == "submit":
    interrupts.say("the job goes on")
print("ready", flush=True)
threading.Event().wait()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    process.stdout.readline()
    for number in sent:
        process.send_signal(number)
    assert process.communicate()[1] == f"{line}\n"
    assert process.returncode == status
