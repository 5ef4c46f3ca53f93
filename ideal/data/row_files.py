"""Files of rows: JSON lines, JSON and Parquet, packed or not, as the trade's tools leave them on a disk.

Text is UTF-8, with or without a byte order mark; anything else is refused, since a model would be trained on what a
wrong decoding makes of it.
"""

from __future__ import annotations

import glob
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from ideal.config.inputs import Source
from ideal.data.parquet import parquet_rows
from ideal.errors import BadInput

LINES = (".jsonl", ".ndjson")
KINDS = (*LINES, ".json", ".parquet")
PACKED = {".gz": "gzip", ".zst": "zstd"}
LONGEST = 2**26
"""Characters of a line: a packed file of some kilobytes may hold one that no memory does."""

Row = tuple[int, Any]
"""Where it stands, from 1 (a line, or a position in a list), and what stands there; None where it can't be read."""


def files_of(source: Source, where: str) -> list[Path]:
    """The local files of a source: patterns resolved, sorted, each file once.

    Raises:
        BadInput: a path names nothing, or a kind of file that isn't read.
    """
    found: dict[Path, Path] = {}
    for pattern in source.files or []:
        hits = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not hits:
            raise BadInput(f"{where}.files", f"no such file: {pattern}", "check the path; it is relative to the config")
        for path in hits:
            found.setdefault(path.resolve(), path)
    for path in found.values():
        if not path.is_file():  # a folder, or a pipe or device, which reading may never end of
            raise BadInput(f"{where}.files", f"{path} is no file", "name files, or a pattern that only files match")
        if _kind(path)[0] not in KINDS:
            kinds = f"{', '.join(KINDS[:-1])} nor {KINDS[-1]}, packed by {' or '.join(PACKED.values())} or not"
            raise BadInput(f"{where}.files", f"{path} is neither {kinds}", "convert it")
    return list(found.values())


def rows_of(path: Path, records: str | None, where: str) -> Iterator[Row]:
    """The rows of a file, in order; blank lines are none.

    Args:
        records: where a JSON file's list stands in it, as a dotted path. Default: it is the file.

    Raises:
        BadInput: the file can't be read as what its name says.
    """
    kind, packed = _kind(path)
    try:
        if kind == ".parquet":
            yield from enumerate(parquet_rows(path), 1)
            return
        with pa.input_stream(str(path), compression=packed) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig")
            yield from _lines(path, text) if kind in LINES else enumerate(_listed(path, text, records, where), 1)
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except (OSError, pa.ArrowException) as error:
        raise BadInput(str(path), f"can't be read ({error})", "check the file") from None


def pick(tree: Any, path: str) -> Any:
    """What stands at a dotted path; None where nothing does."""
    for part in path.split("."):
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return None
    return tree


def _kind(path: Path) -> tuple[str, str | None]:
    """(ending in small letters, what it is packed by)."""
    packed = PACKED.get(path.suffix.lower())
    return (path.with_suffix("") if packed else path).suffix.lower(), packed


def _lines(path: Path, text: io.TextIOWrapper) -> Iterator[Row]:
    number = 0
    while line := text.readline(LONGEST):
        number += 1
        if len(line) == LONGEST and not line.endswith("\n"):
            raise BadInput(f"{path}:{number}", f"is longer than {LONGEST:,} characters", "check the file")
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _listed(path: Path, text: io.TextIOWrapper, records: str | None, where: str) -> list[Any]:
    content = text.read()
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput(str(path), f"is not JSON: {error}", "mend the file") from None
    found = pick(tree, records) if records else tree
    if not isinstance(found, list):
        lists = [k for k, v in tree.items() if isinstance(v, list)] if isinstance(tree, dict) else []
        raise BadInput(
            str(path),
            "holds no list of rows" + (f" at {records!r}" if records else ""),
            f"set {where}.records to one of: {', '.join(lists)}" if lists else "make it a list of objects",
        )
    return found


def _not_utf8(path: Path) -> BadInput:
    """The error of a file that isn't UTF-8: its first line that isn't, and what it looks like."""
    with pa.input_stream(str(path), compression=_kind(path)[1]) as stream:
        for number, line in enumerate(io.BufferedReader(stream), 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                wide = line[:2] in (b"\xff\xfe", b"\xfe\xff") or line.count(0) > len(line) // 4
                looks = "UTF-16" if wide else "Latin-1 or Windows-1252"
                return BadInput(f"{path}:{number}", f"is not UTF-8: it looks like {looks}", "convert it, e.g. by iconv")
    return BadInput(str(path), "is not UTF-8", "convert it, e.g. by iconv")
