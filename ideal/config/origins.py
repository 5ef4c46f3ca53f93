"""A config as it takes effect, written as YAML that can be read again, with the origin of each value beside it.

Paths are absolute, as ``ideal.config.file`` makes them, so the text means the same wherever it lies; `storage` alone
is taken from the working directory where it is relative, in the text as in the file.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ideal.config.config import Config
from ideal.config.file import Given, Place, parse, read
from ideal.config.inputs import Section

SCHEMA = "https://json-schema.org/draft/2020-12/schema"
HEAD = "# Every setting, and where its value is from: default, file or --set."
ALIGNED = 60
"""Longest line, in characters, that moves the column of the origins to the right."""
AUTO = {
    "precision": "the hardware decides when the run starts",
    "shard": "derived from the memory when the run starts",
    "format": "derived from the rows' columns when they are read",
}
"""What decides the settings that can be `auto`."""


def with_origins(path: str | Path, overrides: list[str] | None = None) -> str:
    """The YAML text of a config with all its defaults; each value's origin is a comment.

    Raises:
        BadInput: as ``ideal.config.file.load``.
    """
    given = read(path, overrides)
    config = parse(given.tree, str(path), Path(path).parent)
    lines = [(line.text, _origin(given, line) if line.place else "") for line in _section(config, ())]
    width = max(len(text) for text, origin in lines if origin and len(text) <= ALIGNED)
    return "\n".join([HEAD, *(f"{text:{width}}  # {origin}" if origin else text for text, origin in lines), ""])


def schema() -> dict[str, Any]:
    """The JSON schema of a config's file, for editors."""
    return {"$schema": SCHEMA, **Config.model_json_schema()}


class Line(NamedTuple):
    """A line of YAML.

    Attributes:
        place: of the value that stands in it, if one does.
        auto: what decides that value, if it is `auto`.
    """

    text: str
    place: Place = ()
    auto: str = ""

    def after(self, prefix: str) -> Line:
        return self._replace(text=prefix + self.text)


def _section(section: Section, place: Place) -> Iterator[Line]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        auto = AUTO[name] if value == "auto" and "auto" in typing.get_args(field.annotation) else ""
        yield from _setting(name, value, (*place, name), auto)


def _setting(key: str, value: Any, place: Place, auto: str = "") -> Iterator[Line]:
    below: list[Line] = []
    if isinstance(value, Section):
        below = list(_section(value, place))
    elif isinstance(value, dict):
        below = [line for name, each in value.items() for line in _setting(name, each, (*place, name))]
    elif isinstance(value, list) and value and isinstance(value[0], Section):
        for number, each in enumerate(value):
            first, *rest = _section(each, (*place, number))
            below += [first.after("- "), *(line.after("  ") for line in rest)]
    if not below:
        yield Line(f"{_yaml(key)}: {_yaml(value)}", place, auto)
        return
    yield Line(f"{_yaml(key)}:")
    yield from (line.after("  ") for line in below)


def _origin(given: Given, line: Line) -> str:
    if not _stands(given.tree, line.place):
        origin = "default"
    elif any(all(one == other for one, other in zip(line.place, set_, strict=False)) for set_ in given.overridden):
        origin = "--set"  # of the value, of a part of it, or of what holds it
    else:
        origin = "file"
    return f"{origin}; {line.auto}" if line.auto else origin


def _stands(tree: Any, place: Place) -> bool:
    for step in place:
        try:
            tree = tree[step]
        except (KeyError, TypeError):
            return False
    return True


class _Dumper(yaml.SafeDumper):
    """One line for any value, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    style = None if text.splitlines() in ([], [text]) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _yaml(value: Any) -> str:
    """A value, or a key, in one line."""
    written: str = yaml.dump(
        [value], Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    return written.strip()[1:-1]
