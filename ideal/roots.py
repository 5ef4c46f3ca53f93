"""Where a config's paths may lead, on a cluster that others submit configs to.

``IDEAL_ROOTS`` names the folders, as PATH does; the working directory, which a Ray job brings with it, counts too.
Where it isn't set, on one's own machine, paths lead anywhere. It binds configs, not people: who may submit a job may
run any program.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

from ideal.config import Config
from ideal.config_inputs import Source
from ideal.errors import BadInput

ROOTS = "IDEAL_ROOTS"


def stay_inside(config: Config) -> None:
    """Check every path of a config, links followed, before anything is read or written.

    Raises:
        BadInput: one leads out of the folders that ``IDEAL_ROOTS`` names.
    """
    named = os.environ.get(ROOTS)
    if named is None:
        return
    roots = [Path(folder).resolve() for folder in (*filter(None, named.split(os.pathsep)), ".")]
    for where, path in _paths(config):
        if not any(Path(path).resolve().is_relative_to(root) for root in roots):
            raise BadInput(where, f"{path} is outside of what this cluster lets configs use", f"put it below {named}")


def _paths(config: Config) -> Iterator[tuple[str, str]]:
    yield "storage", str(config.root)
    if os.path.isabs(config.model.source):
        yield "model.source", config.model.source
    if config.model.chat_template:
        yield "model.chat_template", config.model.chat_template
    for benchmark in config.benchmarks:
        if benchmark.include:
            yield f"benchmarks.{benchmark.name}.include", benchmark.include
    for domain in config.domains:
        for part, source in (("train", domain.train), ("reference", domain.reference)):
            yield from ((f"domains.{domain.name}.{part}.files", path) for path in _files(source))
    for source in config.model.made.corpus if config.model.made else []:
        yield from (("model.made.corpus.files", path) for path in _files(source))
    uri = urlparse(config.tracking.uri or "")
    if uri.path and uri.scheme not in ("http", "https"):
        yield "tracking.uri", uri.path if uri.scheme == "file" else uri.path[1:]  # sqlite:////absolute


def _files(source: Source) -> Iterator[str]:
    """The folder in which a pattern begins, and then all that it finds there."""
    for pattern in source.files or []:
        fixed = list(Path(pattern).parts)
        while fixed and glob.has_magic(os.path.join(*fixed)):
            fixed.pop()
        yield os.path.join(*fixed)
        yield from glob.iglob(pattern, recursive=True)
