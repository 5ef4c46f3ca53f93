"""What of Linux a sandboxed program may ask for: a seccomp filter, as Python that installs it in its own process.

Namespaces and limits leave holes that only a filter closes: memory that no limit counts (System V segments, memfd), the
keyring of the user who runs us, sockets that lead past the network namespace (vsock), and system calls that programs
don't need and kernels have had faults in. Those fail with EPERM; everything else is allowed.
"""

from __future__ import annotations

import struct

UNCOUNTED_MEMORY = {"shmget": 29, "shmat": 30, "shmctl": 31, "memfd_create": 319, "memfd_secret": 447}
KEYS = {"add_key": 248, "request_key": 249, "keyctl": 250}
OTHERS_MEMORY = {"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_getfd": 438}
MOUNTS = {"pivot_root": 155, "mount": 165, "umount2": 166, "open_tree": 428, "move_mount": 429, "fsopen": 430}
MOUNTS |= {"fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442, "unshare": 272, "setns": 308}
KERNEL = {"syslog": 103, "acct": 163, "swapon": 167, "swapoff": 168, "reboot": 169, "init_module": 175}
KERNEL |= {"delete_module": 176, "quotactl": 179, "kexec_load": 246, "perf_event_open": 298, "finit_module": 313}
KERNEL |= {"name_to_handle_at": 303, "open_by_handle_at": 304, "kexec_file_load": 320, "bpf": 321}
KERNEL |= {"userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427}
DENIED = {**UNCOUNTED_MEMORY, **KEYS, **OTHERS_MEMORY, **MOUNTS, **KERNEL}
SOCKET, CLONE, CLONE3 = 41, 56, 435
FAMILIES = (1, 2, 10)
"""Of sockets: Unix, IPv4, IPv6, all of which end at the network namespace."""
NAMESPACES = 0x7E020000
"""The flags of ``clone`` that make new ones."""

_X86_64, _X32 = 0xC000003E, 0x40000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NUMBER, _ARCHITECTURE, _ARGUMENT = 0, 4, 16
"""Where they stand in ``struct seccomp_data``."""


def program() -> bytes:
    """The filter, in the kernel's form: 8 bytes an instruction."""
    steps: list[bytes] = []

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> None:
        steps.append(struct.pack("=HBBI", code, yes, no, value))

    def answer(code: int, value: int, result: int) -> None:
        """Return a result where the loaded word passes a test."""
        step(code, value, 0, 1)
        step(_RETURN, result)

    denied = _ERRNO | _EPERM
    step(_LOAD, _ARCHITECTURE)
    step(_EQUAL, _X86_64, 1)
    step(_RETURN, _KILL)
    step(_LOAD, _NUMBER)
    answer(_AT_LEAST, _X32, denied)
    for number in sorted(DENIED.values()):
        answer(_EQUAL, number, denied)
    answer(
        _EQUAL, CLONE3, _ERRNO | _ENOSYS
    )  # its flags are in memory, where no filter sees them; libraries have `clone`
    step(_EQUAL, CLONE, 0, 3)
    step(_LOAD, _ARGUMENT)
    answer(_ANY_BIT, NAMESPACES, denied)
    step(_LOAD, _NUMBER)
    step(_EQUAL, SOCKET, 0, 2 * len(FAMILIES) + 2)
    step(_LOAD, _ARGUMENT)
    for family in FAMILIES:
        answer(_EQUAL, family, _ALLOW)
    step(_RETURN, denied)
    step(_RETURN, _ALLOW)
    return b"".join(steps)


def source() -> str:
    """Python, without a package, that puts the process it runs in under the filter, and all that it starts."""
    return f"""
import ctypes
filter = bytes.fromhex("{program().hex()}")
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(22, 2, ctypes.byref(Program(len(filter) // 8, filter)), 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    raise SystemExit(f"failed: no seccomp: {{ctypes.get_errno()}}")
del ctypes, filter, Program, libc
"""
