"""Rows of a Parquet file. One of a few kilobytes may unpack to more than the machine holds, which its footer tells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ideal.errors import BadInput

UNPACKED = 1000
"""Bytes for one of the file, at most; text packs to a tenth."""
ROWS = 100
"""For one byte of the file, at most: rows that differ take bytes."""
BATCH = 256
"""Rows that are unpacked at a time."""


def parquet_rows(path: Path) -> Iterator[Any]:
    """The rows as dictionaries by column, in order; None for one that holds a date which Python doesn't have.

    Raises:
        BadInput: the file isn't Parquet, or unpacks to more than any data would.
    """
    try:
        file = pq.ParquetFile(path)
        _check_size(path, file.metadata)
        for batch in file.iter_batches(batch_size=BATCH):
            try:
                yield from batch.to_pylist()
            except (ValueError, OverflowError):
                yield from (_in_python(batch.slice(number, 1)) for number in range(batch.num_rows))
    except pa.ArrowException as error:
        raise BadInput(str(path), f"is not a Parquet file: {error}", "check the file") from None


def _check_size(path: Path, footer: Any) -> None:
    packed = path.stat().st_size
    unpacked = sum(footer.row_group(group).total_byte_size for group in range(footer.num_row_groups))
    if unpacked > UNPACKED * packed or footer.num_rows > ROWS * packed:
        raise BadInput(
            str(path),
            f"has {packed:,} bytes and unpacks to {footer.num_rows:,} rows in {unpacked:,} bytes, as no data does",
            "check where it comes from; if it is what you want, write its rows as .jsonl",
        )


def _in_python(row: Any) -> Any:
    try:
        return row.to_pylist()[0]
    except (ValueError, OverflowError):
        return None
