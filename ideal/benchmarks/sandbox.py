"""Model-written Python, run in a process that can reach nothing of this machine.

Linux namespaces make the walls, set up with util-linux (`unshare`, `mount`, `setpriv`, `prlimit`), as root or
without: no network, not even loopback; a root folder of its own that holds the interpreter, its standard
library and the system's read-only, a scratch folder in memory and nothing else, so neither home folder nor
data nor a virtual environment's packages; other processes out of sight; no privileges; an empty environment.
Inside, time, memory, processes, files and output are limited. On a machine that refuses these namespaces
nothing is run.

What it does NOT cover:

- faults of the Linux kernel itself: all system calls are open, with no seccomp filter and no virtual machine;
- a share of the machine: memory and processor time are limited for each process, so that a program may use up
  to `processes` times `memory_bytes`, and every core, until its time is over;
- what every user may read below `/usr`, which it can see and can't change;
- side channels, such as timing, the processor's caches, and what the kernel tells of the machine;
- the answer's honesty: a program can look through the interpreter for the token that reports success, or get
  past its tests by changing what they call.
"""

from __future__ import annotations

import functools
import os
import random
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ideal.errors import BadInput

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
SCRATCH_FILES = 256
OUTPUT_SHOWN = 2000

# Process 1 of the namespaces. When it ends, or its parent does, the kernel kills everything in them.
SETUP = r"""
set -eu
root=$1 disk=$2 user=$3 python=$4
shift 4
mount -t tmpfs -o size=4m,mode=755 tmpfs "$root"
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
mkdir "$root/dev" "$root/tmp"
: > "$root/dev/null"
mount --bind /dev/null "$root/dev/null"
mount -t tmpfs -o "size=$disk,nr_inodes=FILES,mode=1777,nosuid,nodev" tmpfs "$root/tmp"
mount -o remount,bind,ro "$root"
chroot "$root" env -i -C /tmp PATH=/usr/bin:/bin HOME=/tmp PYTHONHASHSEED=0 LANG=C.UTF-8 \
  setpriv $user --bounding-set=-all --inh-caps=-all --no-new-privs \
  prlimit LIMITS "$python" -I -S -c "$CHILD"
"""

CHILD = """
import sys
token, _, program = sys.stdin.read().partition("\\n")
try:
    exec(program, {})
except BaseException as error:
    sys.exit(f"failed: {str(error) or type(error).__name__}")
print("\\n" + token, flush=True)
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use: seconds and bytes; memory and processor time are for each of its processes."""

    wall_seconds: float = 8.0
    cpu_seconds: int = 4
    memory_bytes: int = 512 * 2**20
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
    probe = "import socket\nassert [name for _, name in socket.if_nameindex()] == ['lo']"
    try:
        outcome = _run(probe, Limits(wall_seconds=30))
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
    with tempfile.TemporaryDirectory(prefix="sandbox-") as root, tempfile.TemporaryFile() as output:
        try:
            code = subprocess.run(
                _command(root, limits),
                input=f"{token}\n{program}".encode(errors="replace"),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CHILD": CHILD},
                timeout=limits.wall_seconds,
            ).returncode
            late = False
        except subprocess.TimeoutExpired:
            code, late = -1, True
        output.seek(0)
        said = output.read().decode(errors="replace")
    passed = token in said and code == 0
    said = said.replace(token, "").strip()[-OUTPUT_SHOWN:]
    if passed:
        return Outcome(True, "passed", said)
    failures = [line for line in said.splitlines() if line.startswith("failed: ")]
    failure = failures[-1] if failures else f"failed: ended with status {code}"
    return Outcome(False, "timed out" if late else failure, said)


def _command(root: str, limits: Limits) -> list[str]:
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
        *("sh", "-c", setup, "sandbox", root, str(limits.disk_bytes), user, str(python), *SYSTEM, *prefix),
    ]
