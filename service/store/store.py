"""The folder of all stages: one that happened is never done again.

A stage's fingerprint names its folder. ``stage.json``, with the checksums of all files, is written last: a folder
without it never happened, and one whose files don't match it is run again. That is resuming after a crash, sharing
between runs, and provenance, in one idea.

Two drivers that want one stage: one runs it while the other waits at its lock. Where storage is a URL, records are
copied to it and fetched from it (``service.store.remote``).
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
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ideal.errors import BadInput
from service.store.digests import digests_of
from service.store.remote import Remote
from service.store.stage import R_co, Record, Stage

RECORD = "stage.json"
WORK = "work"
"""A stage's folder for what a retry goes on from; gone once it is recorded."""

FORMAT = "format"
"""A storage's file that says how its stages are named; before there was one, a stage had settings and inputs."""

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
            self._note_format()
        except OSError as error:
            raise BadInput("storage", f"can't be written ({error})", "set storage to a folder of yours") from None

    def run(self, stage: Stage[R_co], work: Callable[[Path], R_co]) -> Record[R_co]:
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
        made = replace(written, fresh=True)
        self._keep(made)
        return made

    def find(self, stage: Stage[R_co]) -> Record[R_co] | None:
        """The record of a stage that has happened and whose files are whole."""
        folder = self._folder(stage)
        path = folder / RECORD
        if not self._whole(folder) and not (self._fetch(stage) and self._whole(folder)):
            return None
        record = json.loads(path.read_text())
        return Record(stage.kind, stage.fingerprint, folder, record["result"], record["seconds"], fresh=False)

    def _note_format(self) -> None:
        """Say once that stages of an earlier version are of no use to this one."""
        note = self.root / FORMAT
        if note.exists():
            return
        if any((self.root / "stages").iterdir()):
            self.notice(f"{self.root} holds stages of an earlier version, which names them otherwise: they run again")
        note.write_text("2\n")

    @property
    def _checksums(self) -> Callable[[Path], str]:
        """What gives a file's checksum: of what is in it now, since stages are going to be computed from it."""
        return self.digests.read

    def _folder(self, stage: Stage[Any]) -> Path:
        return self.root / "stages" / stage.kind / stage.fingerprint

    def _lock(self, stage: Stage[Any]) -> FileLock:
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

    def _fetch(self, stage: Stage[Any]) -> bool:
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

    def _keep(self, record: Record[Any]) -> None:
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

    def _write(self, stage: Stage[Any], folder: Path, result: Mapping[str, Any], started: float) -> None:
        shutil.rmtree(folder / WORK, ignore_errors=True)
        files = {
            str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": self.digests.read(file)}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        body = {
            "kind": stage.kind,
            "fingerprint": stage.fingerprint,
            "version": stage.version,
            "fields": stage.identity,
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
