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
from urllib.parse import unquote, urlparse

import yaml

from ideal.config.config import Config
from ideal.config.inputs import Source
from ideal.config.yaml_file import nodes_of
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
    if config.is_remote and urlparse(config.storage).scheme == "file":
        yield "storage", unquote(urlparse(config.storage).path)
    yield from (("model.source", path) for path in _model(config.model.source))
    if config.model.chat_template:
        yield "model.chat_template", config.model.chat_template
    for benchmark in config.benchmarks:
        if benchmark.include:
            where = f"benchmarks.{benchmark.name}.include"
            yield where, benchmark.include
            yield from ((where, path) for path in _tasks(Path(benchmark.include)))
    for domain in config.domains:
        for part, source in (("train", domain.train), ("reference", domain.reference)):
            yield from _source(f"domains.{domain.name}.{part}", source)
    for source in config.model.made.corpus if config.model.made else []:
        yield from _source("model.made.corpus", source)
    uri = urlparse(config.tracking.uri or "")
    if uri.path and uri.scheme not in ("http", "https"):
        yield "tracking.uri", uri.path if uri.scheme in ("file", "") else uri.path[1:]  # sqlite:////absolute


def _is_path(name: str) -> bool:
    """Whether a name that may be a hub's leads to a folder here, as libraries take it that find one."""
    return os.path.isabs(name) or ".." in Path(name).parts or os.path.exists(name)


def _model(source: str) -> Iterator[str]:
    """A model's folder, and what stands in it: a file there may be a link to another model's, or to a secret."""
    if _is_path(source):
        yield source
        yield from map(str, Path(source).rglob("*"))


def _source(where: str, source: Source) -> Iterator[tuple[str, str]]:
    yield from ((f"{where}.files", path) for path in _files(source))
    if source.hub and _is_path(source.hub):
        yield f"{where}.hub", source.hub


def _tasks(folder: Path) -> Iterator[str]:
    """What a folder's files lead to, and what its tasks name: data, and other task files."""
    for path in folder.rglob("*"):
        yield str(path)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            try:
                nodes = list(nodes_of(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)))
            except (yaml.YAMLError, OSError, UnicodeDecodeError):  # no task then, which its own check says
                continue
            for node in nodes:
                if isinstance(node, yaml.MappingNode):
                    yield from (found for key, value in node.value for found in _named(path, key.value, value))


def _named(task: Path, key: str, value: yaml.Node) -> Iterator[str]:
    """The paths in a task file's value that could lead out: lm-eval takes included files from the task's folder."""
    folder = task.parent if key == "include" else Path()
    for node in value.value if isinstance(value, yaml.SequenceNode) else [value]:
        if isinstance(node, yaml.ScalarNode) and (os.path.isabs(node.value) or ".." in Path(node.value).parts):
            yield str(folder / node.value)


def _files(source: Source) -> Iterator[str]:
    """A pattern, which may be a file's own name, the folder in which it begins, and then all that it finds there."""
    for pattern in source.files or []:
        yield pattern
        fixed = list(Path(pattern).parts)
        while fixed and glob.has_magic(os.path.join(*fixed)):
            fixed.pop()
        yield os.path.join(*fixed)
        yield from glob.iglob(pattern, recursive=True)
