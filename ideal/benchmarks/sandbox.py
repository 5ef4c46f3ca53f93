"""Model-written Python, run in a process that can reach nothing of this machine.

Linux namespaces make the walls, set up with util-linux (`unshare`, `mount`, `setpriv`, `prlimit`), as root or
without: no network, not even loopback; a root folder of its own that holds the interpreter, its standard
library and the system's read-only, a scratch folder in memory and nothing else, so neither home folder nor
data nor a virtual environment's packages (but for a scorer's own, see `started`); other processes out of sight; no
privileges; an empty environment. Inside, time, memory, processes, files and output are limited, and a filter denies
the system calls that would lead past this (`system_calls`). On a machine that refuses any of it nothing is run.

What it does NOT cover:

- faults of the Linux kernel itself in the system calls that are left: there is no virtual machine;
- a share of the machine: processor time is limited for each process, so that a program may use every core until its
  time is over, and what all its processes hold is looked at only a few times a second;
- what every user may read below `/usr`, which it can see and can't change;
- side channels, such as timing, the processor's caches, and what the kernel tells of the machine;
- the answer's honesty: candidate and tests share a process, so that a candidate can change what its tests call,
  or look through the interpreter's frames for the token that reports success.
"""

from __future__ import annotations

import functools
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from ideal.benchmarks import system_calls
from ideal.errors import BadInput

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
SCRATCH_FILES = 256
OUTPUT_SHOWN = 2000
LOOK = 0.2
"""Seconds between looks at a program's memory."""
PATIENCE = 600
"""Seconds for the first program to run in, on a machine that is busy, too."""

# A pipe that nobody writes to ends when this process does, however it does.
WATCHED = '(cat "/dev/fd/$1"; kill -KILL 0) > /dev/null 2>&1 & shift; exec "$@"'

# It asks for the addresses of all interfaces (SIOCGIFCONF), of which there are none, not even loopback's.
PROBE = """
import array, fcntl, socket, struct
room = array.array("B", bytes(4096))
asked = struct.pack("iP", len(room), room.buffer_info()[0])
found = struct.unpack("iP", fcntl.ioctl(socket.socket(), 0x8912, asked))[0]
assert not found, "it has a network"
"""
# Process 1 of the namespaces: it stays the shell, whose death, and whose parent's, ends everything in them.
SETUP = r"""
set -eu
root=$1 disk=$2 user=$3 python=$4
shift 4
mount -t tmpfs -o size=4m,mode=755 tmpfs "$root"
mkdir "$root/tmp"  # first: what is bound below may lie in it
mount -t tmpfs -o "size=$disk,nr_inodes=FILES,mode=1777,nosuid,nodev" tmpfs "$root/tmp"
for path in "$@"; do
  mkdir -p "$root$(dirname "$path")"
  if [ -L "$path" ]; then
    cp -P "$path" "$root$path"
  elif [ -e "$path" ]; then
    if [ -d "$path" ]; then mkdir -p "$root$path"; else : > "$root$path"; fi
    mount --bind "$path" "$root$path"
    mount -o remount,bind,ro,nosuid,nodev "$root$path"
  fi
done
mkdir "$root/dev"
: > "$root/dev/null"
mount --bind /dev/null "$root/dev/null"
mount -o remount,bind,ro "$root"
chroot "$root" env -i -C /tmp PATH=/usr/bin:/bin HOME=/tmp PYTHONHASHSEED=0 LANG=C.UTF-8 \
  setpriv $user --bounding-set=-all --inh-caps=-all --no-new-privs \
  prlimit LIMITS "$python" -I -S -c "$CHILD"
exit 0
"""

# Whatever the program changes, the verdict is not made by what it can rename, and not said on its output.
CHILD = """
import os, sys
def run(write, end, verdicts):
    token, _, program = sys.stdin.read().partition("\\n")
    try:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        try:
            said = str(error) or type(error).__name__
        except BaseException:
            said = "an error without a text"
        write(verdicts, ("failed: " + said).encode(errors="replace")[:REASON])
        end(1)
    write(verdicts, token.encode())
    try:
        sys.stdout.flush()
    except BaseException:
        pass
    end(0)
run(os.write, os._exit, VERDICTS)
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use: seconds and bytes; processor time and `memory_bytes` are for each of its processes."""

    wall_seconds: float = 8.0
    cpu_seconds: int = 4
    memory_bytes: int = 512 * 2**20
    total_bytes: int = 1024 * 2**20
    disk_bytes: int = 16 * 2**20
    processes: int = 16


@dataclass(frozen=True)
class Outcome:
    """How a program ended: whether it ran to its end without an error, and if not, why; its last output."""

    passed: bool
    reason: str
    output: str


def run(program: str, limits: Limits = Limits()) -> Outcome:
    """Run a program to its end, or until a limit stops it.

    Raises:
        BadInput: this machine can't wall off a process; nothing was run.
    """
    require()
    return _run(program, limits)


@functools.cache
def require() -> None:
    """Check, once a process, that a program runs here and finds no network.

    Raises:
        BadInput: this machine can't wall off a process.
    """
    try:
        outcome = _run(PROBE, Limits(wall_seconds=PATIENCE, cpu_seconds=60))
        reason = outcome.output or outcome.reason
    except OSError as error:
        outcome, reason = None, str(error)
    if outcome is None or not outcome.passed:
        raise BadInput(
            "allow_code_execution",
            f"this machine can't wall off model-written code: {' '.join(reason.split())}",
            "use Linux with util-linux and let it make namespaces (in a container: CAP_SYS_ADMIN, or "
            "`--security-opt seccomp=unconfined`), or leave benchmarks that run code out",
        )


def _run(program: str, limits: Limits) -> Outcome:
    token = secrets.token_hex(16)
    verdicts, theirs = os.pipe()
    with os.fdopen(verdicts, "rb") as told, tempfile.TemporaryFile() as output:
        child = CHILD.replace("REASON", str(OUTPUT_SHOWN)).replace("VERDICTS", str(theirs))
        try:
            with _process(child, limits, stdout=output, pass_fds=[theirs]) as (process, memory):
                try:
                    process.communicate(f"{token}\n{program}".encode(errors="replace"), limits.wall_seconds)
                    late = False
                except subprocess.TimeoutExpired:
                    late = True
        finally:
            os.close(theirs)
        os.set_blocking(told.fileno(), False)
        verdict = (told.read(OUTPUT_SHOWN) or b"").decode(errors="replace")
        output.seek(0)
        said = output.read().decode(errors="replace").strip()[-OUTPUT_SHOWN:]
    if memory.over:
        return Outcome(False, f"out of memory: more than {limits.total_bytes >> 20} MiB in all its processes", said)
    if late:
        return Outcome(False, "timed out", said)
    if verdict == token:
        return Outcome(True, "passed", said)
    return Outcome(False, verdict or f"failed: ended with status {process.returncode}", said)


@contextmanager
def started(program: str, limits: Limits, packages: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A program that is talked to by its stdin and stdout, in the sandbox; it ends with the context.

    Args:
        program: Python.
        packages: folders that it may read, beside the interpreter's own.

    Raises:
        BadInput: this machine can't wall off a process; nothing was run.
    """
    require()
    with _process(program, limits, stdout=subprocess.PIPE, packages=packages) as (process, _):
        yield process


@contextmanager
def _process(
    child: str,
    limits: Limits,
    *,
    stdout: IO[bytes] | int,
    pass_fds: Sequence[int] = (),
    packages: Sequence[str] = (),
) -> Iterator[tuple[subprocess.Popen[bytes], Memory]]:
    """Python in the sandbox under the filter of system calls; at the context's end nothing of it runs."""
    watched, ours = os.pipe()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as root, os.fdopen(ours, "wb"):
        process = subprocess.Popen(
            ["sh", "-c", WATCHED, "sandbox", str(watched), *_command(root, limits, packages)],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CHILD": system_calls.source() + child},
            pass_fds=[watched, *pass_fds],
            start_new_session=True,
        )
        os.close(watched)
        memory = Memory(process, limits.total_bytes)
        try:
            yield process, memory
        finally:
            memory.ended.set()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    with suppress(OSError):
                        stream.close()


class Memory:
    """A look, now and then, at what all processes of a program hold by themselves; too much ends them.

    A limit of Linux's is for one process each, and a cgroup is rarely anybody's to make.
    """

    def __init__(self, process: subprocess.Popen[bytes], most: int) -> None:
        self.process, self.most, self.over = process, most, False
        self.ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self.ended.wait(LOOK):
            if self._held() > self.most:
                self.over = True
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                return

    def _held(self) -> int:
        held = 0
        with suppress(psutil.Error):
            for each in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    memory = each.memory_info()
                    held += memory.rss - memory.shared
        return held


def _command(root: str, limits: Limits, packages: Sequence[str] = ()) -> list[str]:
    """The command that makes the namespaces, as root directly and else within a user namespace.

    The kernel exempts root from the limit on processes, so that root's programs run as a user that nobody is.
    """
    user, namespaces = "", ["--net", "--pid", "--mount", "--ipc", "--uts"]
    if os.geteuid() == 0:
        number = random.SystemRandom().randrange(20_000, 60_000)
        user = f"--reuid={number} --regid={number} --clear-groups"
    else:
        namespaces += ["--user", "--map-root-user"]
    allowed = {
        "as": limits.memory_bytes,
        "cpu": limits.cpu_seconds,
        "fsize": limits.disk_bytes,
        "nproc": limits.processes,
        "nofile": 64,
        "core": 0,
    }
    setup = SETUP.replace("LIMITS", " ".join(f"--{name}={value}" for name, value in allowed.items()))
    setup = setup.replace("FILES", str(SCRATCH_FILES))
    python = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    prefix = [] if Path(sys.base_prefix).is_relative_to("/usr") else [sys.base_prefix]
    return [
        *("unshare", *namespaces, "--fork", "--kill-child", "--propagation", "private"),
        *("sh", "-c", setup, "sandbox", root, str(limits.disk_bytes), user, str(python), *SYSTEM, *prefix, *packages),
    ]
