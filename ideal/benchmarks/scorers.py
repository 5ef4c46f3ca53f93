"""Scores of reasoning-gym's answers, by its own scorers, without running what a model wrote.

Some of those scorers evaluate the answer: by ``eval``, or by sympy's parser, which ends in ``eval`` too. So a model
that was fine-tuned on a poisoned data set could run any command here. A scorer that is known to compare text is called
in this process; every other one runs in the sandbox, each answer in a process of its own with a limit on its time. An
answer whose scorer raises, or doesn't come to its end, scores 0.
"""

from __future__ import annotations

import base64
import json
import pickle
import selectors
import subprocess
import sysconfig
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from ideal.benchmarks import sandbox

COMPARE_TEXT = {
    *("ab", "chain_sum", "circuit_logic", "color_cube_rotation", "dice", "emoji_mystery", "family_relationships"),
    *("figlet_font", "letter_jumble", "needle_haystack", "path_star", "products", "self_reference"),
    *("sentence_reordering", "spell_backward", "zebra_puzzles"),
}
"""Tasks with a scorer of their own that was read and only compares texts or one decimal number."""
CPU_SECONDS = 10
"""For an answer, of its process."""
SECONDS = 60
"""For an answer, of the clock; a scorer takes milliseconds, on a busy machine too."""
PATIENCE = 600
"""Seconds until the sandbox must have answered, on a machine that is busy with something else, too."""
READY, NO_VERDICT = b"ready\n", b"\n"
LONGEST = 1000
"""Bytes of a line."""
LIMITS = sandbox.Limits(cpu_seconds=3600, memory_bytes=4 * 2**30, wall_seconds=24 * 3600)
"""The parent's own, which lives as long as the benchmark; an answer has ``CPU_SECONDS`` and a part of the memory."""

# It reads the task, then an answer a line, and gives each to a child that can't write to its output.
SERVER = """
import sys
task = __import__("json").loads(sys.stdin.buffer.readline())
sys.path += task["packages"]
import base64, ctypes, json, os, pickle, resource, select, signal
import reasoning_gym
made = reasoning_gym.create_dataset(task["name"], size=task["size"], seed=task["seed"], **task["options"])
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: a child can't look into its parent
replies = os.dup(1)
for number in (1, 2):
    os.dup2(os.open("/dev/null", os.O_WRONLY), number)

def score(entry, answer, out):
    for number in (0, 1, 2, replies):
        os.close(number)
    resource.setrlimit(resource.RLIMIT_CPU, (task["cpu"], task["cpu"]))
    resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))
    os.write(out, repr(float(made.score_answer(answer, entry))).encode())

os.write(replies, b"ready\\n")
for line in sys.stdin.buffer:
    entry, answer = json.loads(line)
    entry = pickle.loads(base64.b64decode(entry))
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(readable)
            score(entry, answer, writable)
        finally:
            os._exit(0)
    os.close(writable)
    select.select([readable], [], [], task["wall"])
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass
    os.waitpid(child, 0)
    os.set_blocking(readable, False)
    try:
        told = os.read(readable, 64)
    except BlockingIOError:
        told = b""
    os.close(readable)
    os.write(replies, told.split(b"\\n")[0] + b"\\n")
"""


class Scorer:
    """A reasoning-gym data set's scorer.

    Attributes:
        entries: its items.
        failed: answers that scored 0 because their scorer raised or didn't come to its end.
    """

    def __init__(self, name: str, *, size: int, seed: int, options: Mapping[str, Any]) -> None:
        self.name = name
        self.task: dict[str, Any] = {
            "name": name,
            "size": size,
            "seed": seed,
            "options": dict(options),
            "cpu": CPU_SECONDS,
            "wall": SECONDS,
        }
        self._made = reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
        self.entries = [self._made[item] for item in range(size)]
        self.failed = 0
        self._open = ExitStack()
        self._server: subprocess.Popen[bytes] | None = None

    def __call__(self, item: int, answer: str) -> float:
        """The score of an answer to an item, 0 to 1.

        Raises:
            BadInput: the scorer needs a sandbox, and this machine can't make one.
            RuntimeError: the scorer doesn't even start there, so that a 0 would be no verdict.
        """
        try:
            score = self._here(item, answer) if compares_text(self.name) else self._inside(item, answer)
        except (ValueError, OSError):
            self.failed += 1
            return 0.0
        return score if 0 <= score <= 1 else 0.0

    def _here(self, item: int, answer: str) -> float:
        try:
            return float(self._made.score_answer(answer, self.entries[item]))
        except Exception as error:
            raise ValueError(str(error)) from error

    def _inside(self, item: int, answer: str) -> float:
        if self._server is None:
            self._server = self._started()
        try:
            entry = base64.b64encode(pickle.dumps(self.entries[item])).decode()  # made there, it could be another
            self._tell(self._server, [entry, answer])
            said = self._heard(self._server)
            if said == NO_VERDICT:
                raise ValueError("its scorer raised, or took too long")
            return _number(said)
        except OSError:
            self.close()
            raise

    def _started(self) -> subprocess.Popen[bytes]:
        paths = sysconfig.get_paths()
        packages = sorted({paths["purelib"], paths["platlib"]})
        server = self._open.enter_context(sandbox.started(SERVER, LIMITS, packages))
        self._tell(server, {**self.task, "packages": packages})
        said: list[bytes] = []
        while (line := self._heard(server)) != READY:
            said.append(line)
            if not line:
                text = b"".join(said).decode(errors="replace").strip()
                raise RuntimeError(f"the sandbox of {self.name}'s scorer doesn't start: {text[-1000:]}")
        return server

    @staticmethod
    def _tell(server: subprocess.Popen[bytes], line: object) -> None:
        assert server.stdin
        server.stdin.write(json.dumps(line).encode() + b"\n")
        server.stdin.flush()

    @staticmethod
    def _heard(server: subprocess.Popen[bytes]) -> bytes:
        """The next line that it writes; empty once it has ended.

        Raises:
            TimeoutError: it hangs.
        """
        assert server.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(server.stdout, selectors.EVENT_READ)
            if not selector.select(PATIENCE):
                raise TimeoutError("the sandbox doesn't answer")
        return server.stdout.readline(LONGEST)

    def close(self) -> None:
        """End the sandbox, if there is one; another answer starts another."""
        self._open.close()
        self._server = None


def _number(said: bytes) -> float:
    """The score in a line.

    Raises:
        BrokenPipeError: it is none: an end, or what the shell says when an answer has killed the scorer.
    """
    try:
        return float(said)
    except ValueError:
        raise BrokenPipeError(f"it ended: {said!r}") from None


def compares_text(name: str) -> bool:
    """Whether a task's scorer runs nothing of an answer: it was read, or it is the one that most tasks share."""
    common = DATASETS[name][0].score_answer is ProceduralDataset.score_answer
    return common or name in COMPARE_TEXT
