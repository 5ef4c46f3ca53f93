"""Stages as values: a step of a run is named by what goes into it, and recorded once.

A stage's fingerprint is the hash of its kind, of the settings that change its result, and of its inputs'
fingerprints; it names the stage's folder. ``stage.json``, with the checksums of all files, is written last: a folder
without it never happened, and one whose files don't match it is run again. That is resuming after a crash, sharing
between runs, and provenance, in one idea.

Two drivers that want one stage: one runs it while the other waits at its lock. Where storage is a URL, records are
copied to it and fetched from it (``service.remote``).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ideal.errors import BadInput
from service.digests import digests_of
from service.remote import Remote

RECORD = "stage.json"
WORK = "work"
"""A stage's folder for what a retry goes on from; gone once it is recorded."""

RESULTS_CHANGED_IN = {
    "model": 2,
    "examples": 2,
    "data": 2,
    "sft": 3,
    "reference": 3,
    "influence": 4,
    "benchmark": 2,
    "retraining": 2,
    "prediction": 3,
    "doremi": 2,
    "doge": 2,
    "merged": 2,
    "regmix": 1,
}
"""Raised when new code gives a kind of stage other results, so that old records are not taken for new ones."""


@dataclass(frozen=True)
class Stage:
    """A step and everything that its result depends on.

    Attributes:
        kind: one of ``RESULTS_CHANGED_IN``.
        settings: JSON-like; what doesn't change the result stays out.
        inputs: fingerprints by role.
    """

    kind: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        identity = {
            "kind": self.kind,
            "results": RESULTS_CHANGED_IN[self.kind],
            "settings": self.settings,
            "inputs": dict(self.inputs),
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Record:
    """A stage that has happened.

    Attributes:
        result: its small numbers, JSON-like.
        seconds: how long it ran.
        fresh: whether it ran now, not before.
    """

    kind: str
    fingerprint: str
    folder: Path
    result: dict[str, Any]
    seconds: float
    fresh: bool


FULL = ("No space left on device", "Disk quota exceeded", "database or disk is full")
"""What errors of a full disk say, whoever raises them: Rust's, C++'s, another process's."""
NOTHING_LEFT = 65536
"""Bytes: with fewer, a library that says something else (torch: `unexpected pos`) has found no room, too."""


class Store:
    """The folder of all stages.

    Args:
        notice: told what a user should know, a line at a time.
        remote: where recorded stages are copied to, and fetched from.
    """

    def __init__(self, root: Path, notice: Callable[[str], None] = print, remote: Remote | None = None) -> None:
        self.root, self.notice, self.remote = root, notice, remote
        self.digests = digests_of(root)
        self._locks = root / "locks"
        self._kept: set[Path] = set()
        try:
            (root / "stages").mkdir(parents=True, exist_ok=True)
            self._locks.mkdir(exist_ok=True)
        except OSError as error:
            raise BadInput("storage", f"can't be written ({error})", "set storage to a folder of yours") from None

    def run(self, stage: Stage, work: Callable[[Path], dict[str, Any]]) -> Record:
        """The stage's record; runs ``work`` in its folder if there is none.

        Raises:
            BadInput: the disk is full, or the storage isn't there any more.
        """
        found = self.find(stage)
        if found:
            self._keep(found)
            return found
        folder, lock = self._folder(stage), self._lock(stage)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.notice(f"another run is busy with {stage.kind} {stage.fingerprint}: waiting for it")
            lock.acquire()
        try:
            found = self.find(stage)
            if found:
                return found
            _clear(folder)
            started = time.monotonic()
            result = work(folder)
            self._write(stage, folder, result, started)
        except BaseException as error:  # torch's checkpoints raise what is no Exception
            if not isinstance(error, KeyboardInterrupt | SystemExit | BadInput):
                self._explain(error)
            raise
        finally:
            lock.release()
        written = self.find(stage)
        assert written is not None
        made = Record(**{**vars(written), "fresh": True})
        self._keep(made)
        return made

    def find(self, stage: Stage) -> Record | None:
        """The record of a stage that has happened and whose files are whole."""
        folder = self._folder(stage)
        path = folder / RECORD
        if not self._whole(folder) and not (self._fetch(stage) and self._whole(folder)):
            return None
        record = json.loads(path.read_text())
        return Record(stage.kind, stage.fingerprint, folder, record["result"], record["seconds"], fresh=False)

    @property
    def _checksums(self) -> Callable[[Path], str]:
        """What gives a file's checksum: of what is in it now, since stages are going to be computed from it."""
        return self.digests.read

    def _folder(self, stage: Stage) -> Path:
        return self.root / "stages" / stage.kind / stage.fingerprint

    def _lock(self, stage: Stage) -> FileLock:
        return FileLock(self._locks / f"{stage.kind}-{stage.fingerprint}.lock")

    def _whole(self, folder: Path) -> bool:
        path = folder / RECORD
        if not path.exists():
            return False
        damage = _damage(str(folder), path.stat().st_mtime_ns, self._checksums)
        if damage:
            next_ = "running this stage again" if self.remote is None else "fetching it, or running this stage again"
            self.notice(f"{folder} is damaged ({damage}): {next_}")
            path.unlink()
        return not damage

    def _fetch(self, stage: Stage) -> bool:
        """Bring a recorded stage here, unless somebody here works on it."""
        if self.remote is None:
            return False
        try:
            with self._lock(stage).acquire(timeout=0):
                place = str(self._folder(stage).relative_to(self.root))
                return self.remote.fetch(place, self._folder(stage), RECORD)
        except Timeout:
            return False
        except OSError as error:
            self.notice(f"{stage.kind} {stage.fingerprint} can't be fetched from {self.remote.url} ({error})")
            return False

    def _explain(self, error: BaseException) -> None:
        """Raise what a user can mend, if that is why a stage broke: a storage that is full, or that was removed."""
        if not self._locks.is_dir():  # workers make the others' folders again
            raise BadInput(
                "storage", f"{self.root} was removed while the run went on", "bring it back, or start again"
            ) from None
        if self._is_full(error):
            raise BadInput(
                "storage", f"{self.root} is full", "free some space; the same command goes on from here"
            ) from None

    def _is_full(self, error: BaseException) -> bool:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in FULL):
            return True
        return self.root.exists() and shutil.disk_usage(self.root).free < NOTHING_LEFT

    def _keep(self, record: Record) -> None:
        """Copy a recorded stage to where it outlives this machine; what can't be copied now is by the next run."""
        if self.remote is None or record.folder in self._kept:
            return
        place = str(record.folder.relative_to(self.root))
        try:
            if record.fresh or not self.remote.same(record.folder / RECORD, f"{place}/{RECORD}"):
                self.remote.keep(record.folder, place, RECORD)
            self._kept.add(record.folder)
        except OSError as error:
            self.notice(f"{place} isn't at {self.remote.url} yet ({error}); the next run copies it")

    def missing(self, stages: Iterable[Stage]) -> list[Stage]:
        """Those that must still run."""
        return [stage for stage in stages if self.find(stage) is None]

    def _write(self, stage: Stage, folder: Path, result: dict[str, Any], started: float) -> None:
        shutil.rmtree(folder / WORK, ignore_errors=True)
        files = {
            str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": self.digests.read(file)}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        body = {
            "kind": stage.kind,
            "fingerprint": stage.fingerprint,
            "settings": dict(stage.settings),
            "inputs": dict(stage.inputs),
            "result": result,
            "files": files,
            "seconds": round(time.monotonic() - started, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "made_by": {
                "version": version("ideal-mixture"),
                "torch": version("torch"),
                "python": platform.python_version(),
                "host": socket.gethostname(),
            },
        }
        body["checksum"] = _checksum(body)
        temporary = folder / f"{RECORD}.tmp"
        with temporary.open("w") as out:
            json.dump(body, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        temporary.rename(folder / RECORD)


class Unfinished(Exception):
    """A stage that hasn't happened, asked of a store that runs nothing."""


class Records(Store):
    """A store that runs nothing: what the records say, as far as they go.

    Files that are as they were when they were last read aren't read again: a ``Store`` does so before it runs a stage.
    """

    @property
    def _checksums(self) -> Callable[[Path], str]:
        return self.digests.of

    def run(self, stage: Stage, work: Callable[[Path], dict[str, Any]]) -> Record:
        """The stage's record.

        Raises:
            Unfinished: there is none.
        """
        self.missing([stage])
        found = self.find(stage)
        assert found is not None
        return found

    def missing(self, stages: Iterable[Stage]) -> list[Stage]:
        """None.

        Raises:
            Unfinished: there is one.
        """
        for stage in super().missing(stages):
            raise Unfinished(stage.kind)
        return []


def _clear(folder: Path) -> None:
    """Leave nothing half-written of an earlier try, but what it can go on from."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.name != WORK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (folder / WORK).mkdir(exist_ok=True)


@cache
def _damage(folder: str, written: int, checksum: Callable[[Path], str]) -> str | None:
    """What is wrong with a recorded folder; None if its record and all its files are as written.

    Args:
        checksum: of a file.
    """
    try:
        record = json.loads((Path(folder) / RECORD).read_text())
        if record.pop("checksum") != _checksum(record):
            return f"{RECORD}: wrong checksum"
        for name, expected in record["files"].items():
            path = Path(folder) / name
            if not path.is_file():
                return f"{name}: missing"
            if path.stat().st_size != expected["bytes"] or checksum(path) != expected["sha256"]:
                return f"{name}: wrong checksum"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{RECORD}: {error}"
    return None


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
