"""Files by their content: one that lies elsewhere is the same, one that was changed is another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ideal.config.inputs import BenchmarkConfig, Source
from ideal.data.row_files import files_of

Checksum = Callable[[Path], str]
"""Of a file's content."""


def source_content(where: str, source: Source, checksum: Checksum) -> dict[str, Any]:
    """A source with its files' content in place of their names.

    Args:
        where: the source's place in the config, for errors.
    """
    files = [checksum(path) for path in files_of(source, where)]
    return {**source.model_dump(mode="json", exclude={"files"}), "files": files}


def included_content(benchmark: BenchmarkConfig, checksum: Checksum) -> list[str] | None:
    """The content of a benchmark's own task files; None if it has none."""
    if not benchmark.include:
        return None
    return [checksum(file) for file in sorted(Path(benchmark.include).rglob("*")) if file.is_file()]
