"""Checksums of files, noted: a file that is as it was when it was last read isn't read again.

As it was means its size, its times of writing and of change, and its inode. A byte that rots on the disk alters none
of these; so what computes with a file reads it (``Digests.read``), and what only looks at records asks here.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from functools import cache
from pathlib import Path

SETTLED = 2.0
"""Seconds after a file was written; until then a second writing may leave its times as they are."""

FILE = "digests.jsonl"

Seen = tuple[int, int, int, int]
"""Size in bytes, nanoseconds of writing and of change, inode."""


class Digests:
    """The checksums of a storage folder's files and of those that its runs read.

    Every line of the file is one checksum, later ones win: several processes add to it, and what is lost or broken
    is read again.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Seen, str]] = {}
        self._load()

    def of(self, path: Path) -> str:
        """A file's SHA-256; read only if it isn't as it was.

        Raises:
            OSError: it can't be read.
        """
        found = self._known.get(str(path.absolute()))
        return found[1] if found and found[0] == _seen(path) else self.read(path)

    def read(self, path: Path) -> str:
        """A file's SHA-256, of what is in it now.

        Raises:
            OSError: it can't be read.
        """
        seen = _seen(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time_ns() - max(seen[1], seen[2]) > SETTLED * 1e9:
            self._note(str(path.absolute()), seen, digest)
        return digest

    def _note(self, name: str, seen: Seen, digest: str) -> None:
        with self._lock:
            if self._known.get(name) == (seen, digest):
                return
            self._known[name] = seen, digest
            try:
                with self.file.open("a", encoding="utf-8") as out:
                    out.write(_line(name, seen, digest))
            except OSError:  # a full or read-only disk: it is read again
                return

    def _load(self) -> None:
        try:
            text = self.file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        lines, whole = text.splitlines(), not text or text.endswith("\n")
        for line in lines:
            try:
                name, seen, digest = json.loads(line)
                size, written, changed, inode = map(int, seen)
                self._known[str(name)] = (size, written, changed, inode), str(digest)
            except (ValueError, TypeError):
                whole = False
        if not whole or len(lines) > 2 * len(self._known) + 100:
            self._rewrite()

    def _rewrite(self) -> None:
        """Leave out what later lines say anew, and files that are gone."""
        there = {name: each for name, each in self._known.items() if Path(name).exists()}
        whole = self.file.with_suffix(f".{os.getpid()}")
        try:
            whole.write_text("".join(_line(name, *each) for name, each in there.items()), encoding="utf-8")
            whole.rename(self.file)
        except OSError:
            whole.unlink(missing_ok=True)


@cache
def digests_of(root: Path) -> Digests:
    """Those of a storage folder, the same for all of this process."""
    return Digests(root / FILE)


def _line(name: str, seen: Seen, digest: str) -> str:
    return json.dumps([name, seen, digest]) + "\n"


def _seen(path: Path) -> Seen:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
