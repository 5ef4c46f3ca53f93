"""Ctrl-C, SIGTERM and SIGHUP at any moment: one line on stderr, no process left behind, exit status 128 + n.

A run may be killed outright at any moment and goes on from its records, so an interrupt unwinds nothing. The command
is two processes: one that works, and one above it that only waits for signals and for the other's end. It takes an
interrupt whatever the worker does, says one line, and kills the worker and all that it has started. The worker blocks
these signals, so that no library's handler runs: Ray's prints a C++ stack, Tune's lets its trials go on.

A worker that can't go on for want of what it started asks for another (``begin_again``); one for want of what others
started asks to be ended (``give_up``).
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

STAGED = ("run", "sweep", "compare", "fidelity")
"""The commands whose stages are recorded."""
GOES_ON = "stopped; the same command goes on from the last finished stage"
RESTARTS = 3
"""Of one command by ``begin_again``."""
ASKS = signal.SIGUSR1
"""What a worker asks its guard with for another."""
ENDS = signal.SIGUSR2
"""And for its end."""
GIVEN_UP = 2
"""The exit status then, which is that of bad input."""
SHORT = "/tmp"
"""Where a path is short, whatever TMPDIR says."""
PATIENCE = 60
"""Seconds that killed processes may take to go: the system may still be writing what they hold."""
PR_SET_PDEATHSIG = 1
SHOW_CURSOR = b"\x1b[?25h\n"

_said = mmap.mmap(-1, 4096)  # what an interrupt says; both processes see it
_guarded = False


def guard(arguments: list[str]) -> None:
    """Go on in a new process, guarded by this one; returns in the new one alone.

    Call it before anything else is imported: what starts a thread can't be forked. A signal that is ignored stays
    ignored, as ``nohup`` wants it.

    Args:
        arguments: the command line's, which decide what an interrupt says.
    """
    global _guarded
    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    taken = {number for number in asked if signal.getsignal(number) != signal.SIG_IGN}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {*taken, signal.SIGCHLD, ASKS, ENDS})
    this = os.getpid()
    for _ in range(RESTARTS + 1):
        say(GOES_ON if arguments and arguments[0] in STAGED else "stopped")
        worker = os.fork()
        if not worker:
            break
        status = _watch(worker, taken)
        if status != 128 + ASKS:
            os._exit(GIVEN_UP if status == 128 + ENDS else status)
    else:
        os._exit(1)
    _guarded = True
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != this:
        os._exit(1)  # it died before this one was bound to it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, ASKS, ENDS})
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, taken))


def begin_again(line: str) -> None:
    """End this process and all that it started, and run the command once more, ``RESTARTS`` times at most.

    Returns where nothing guards this process.

    Args:
        line: what is said then.
    """
    _ask(ASKS, line)


def give_up(line: str) -> None:
    """End this process and all that it started, with the status ``GIVEN_UP``.

    Returns where nothing guards this process.

    Args:
        line: what is said then.
    """
    _ask(ENDS, line)


def _ask(number: signal.Signals, line: str) -> None:
    if not _guarded:
        return
    say(line)
    os.kill(os.getppid(), number)
    while True:
        time.sleep(1)


def say(line: str) -> None:
    """Set what an interrupt says from now on."""
    _said[:] = line.encode().ljust(len(_said), b"\0")


def temporary_folder(place: str | None = None) -> Path:
    """A new folder that goes away with this process, interrupted or not.

    Args:
        place: where. Default: TMPDIR.
    """
    folder = Path(tempfile.mkdtemp(prefix=_prefix(os.getpid()), dir=place))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _prefix(worker: int) -> str:
    return f"ideal-{worker}-"


def _watch(worker: int, taken: set[signal.Signals]) -> int:
    """The exit status, once the worker has ended or a signal has come."""
    while True:
        number = signal.sigwait({*taken, signal.SIGCHLD, ASKS, ENDS})
        if number != signal.SIGCHLD:
            break
        ended, status = os.waitpid(worker, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if code >= 0:
                return code
            number = signal.Signals(-code)
            say(f"killed by {number.name}")
            break
    with suppress(psutil.Error, OSError):
        _end()
    for place in {SHORT, tempfile.gettempdir()}:
        for folder in Path(place).glob(f"{_prefix(worker)}*"):
            shutil.rmtree(folder, ignore_errors=True)
    return 128 + number


def _end() -> None:
    """Freeze everything below this process, so that nothing is started or said any more; say the line; kill all."""
    this = psutil.Process()
    frozen: set[psutil.Process] = set()
    while new := set(this.children(recursive=True)) - frozen:
        for process in new:
            with suppress(psutil.Error):
                process.suspend()
        frozen |= new
    cursor = SHOW_CURSOR if os.isatty(1) else b""  # a progress bar hides it
    for stream, text in ((1, cursor), (2, _said[:].rstrip(b"\0") + b"\n")):
        with suppress(OSError):  # a terminal that is closed sends SIGHUP, and can't be written any more
            os.write(stream, text)
    for process in frozen:
        with suppress(psutil.Error):
            process.kill()
    deadline = time.monotonic() + PATIENCE
    while any(map(_lives, frozen)) and time.monotonic() < deadline:
        time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    """Whether it runs; one that only waits for its parent to read its status doesn't."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
