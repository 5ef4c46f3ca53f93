"""Storage behind a URL: recorded stages are copied to object storage, and fetched from there where they aren't here.

A stage is worked on in a folder of the cluster that runs it. Once it is recorded its files go to the URL, the record
last, so that nobody finds half a stage there; what is fetched has its checksums tried as if it had been made here. A
run that ends on one machine goes on on another, and no result is lost with a machine. pyarrow's filesystems copy.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from ideal.config.config import Config
from ideal.errors import BadInput

HERE = LocalFileSystem()


class Remote:
    """A folder behind a URL.

    Args:
        url: as pyarrow's ``FileSystem.from_uri`` takes it: s3://bucket/prefix, gs://…, abfs://…, file:///….

    Raises:
        BadInput: it can't be reached, or there is no such bucket.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.files, self.path = FileSystem.from_uri(url)
            bucket = self.path.partition("/")[0]
            there = not bucket or self.files.get_file_info(bucket).type == FileType.Directory
        except (OSError, pyarrow.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise BadInput(
                "storage", f"{url} can't be reached: {reason}", "check the URL and the credentials"
            ) from None
        if not there:
            raise BadInput("storage", f"{url}: there is no bucket {bucket!r}", "make it, or name another")

    def has(self, place: str) -> bool:
        """Whether a file is there."""
        return bool(self.files.get_file_info(f"{self.path}/{place}").type == FileType.File)

    def same(self, file: Path, place: str) -> bool:
        """Whether a file is there as it is here."""
        if not self.has(place):
            return False
        with self.files.open_input_stream(f"{self.path}/{place}") as there:
            return bool(there.read() == file.read_bytes())

    def fetch(self, place: str, folder: Path, last: str) -> bool:
        """Copy what lies at ``place`` into a folder, which appears whole; False if the file ``last`` isn't there.

        Raises:
            OSError: it can't be read, or a name leads out of the folder.
        """
        if not self.has(f"{place}/{last}"):
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        fetched = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
        try:
            root = f"{self.path}/{place}"
            for found in self.files.get_file_info(FileSelector(root, recursive=True)):
                if found.type != FileType.File:
                    continue
                name = PurePosixPath(found.path).relative_to(root)
                if ".." in name.parts:
                    raise OSError(f"{self.url}: {found.path} leads out of its stage")
                (fetched / name).parent.mkdir(parents=True, exist_ok=True)
                self._copy(found.path, str(fetched / name), self.files, HERE)
            shutil.rmtree(folder, ignore_errors=True)
            fetched.chmod(0o755)
            fetched.rename(folder)
        finally:
            shutil.rmtree(fetched, ignore_errors=True)
        return True

    def keep(self, folder: Path, place: str, last: str | None = None) -> None:
        """Copy a folder's files to ``place``, the one named ``last`` after the others.

        Raises:
            OSError: they can't be written, or aren't as long there as here.
        """
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        for name in sorted(names, key=lambda each: each == last):
            target = f"{self.path}/{place}/{name}"
            if isinstance(self.files, LocalFileSystem):
                self.files.create_dir(os.path.dirname(target), recursive=True)
            self._copy(str(folder / name), target, HERE, self.files)

    def _copy(self, source: str, target: str, of: Any, to: Any) -> None:
        """pyarrow doesn't raise where an object's last part fails to be written; its length tells."""
        copy_files(source, target, source_filesystem=of, destination_filesystem=to)
        wanted, found = of.get_file_info(source).size, to.get_file_info(target).size
        if wanted != found:
            raise OSError(f"{target} has {found} of {wanted} bytes")


_reached = cache(Remote)  # a sweep replays its trials' records all the time


def remote_of(config: Config) -> Remote | None:
    """What a config's ``storage`` names, if that is a URL.

    Raises:
        BadInput: as ``Remote``.
    """
    return _reached(config.storage) if config.is_remote else None


def keep_report(config: Config, folder: Path) -> str | None:
    """Copy a report's folder to where its stages are; what went wrong, if something did, for the user."""
    try:
        if remote := remote_of(config):
            remote.keep(folder, str(folder.relative_to(config.root)))
    except (OSError, BadInput) as error:
        return f"the report isn't at {config.storage} yet ({error}); the same command copies it"
    return None
