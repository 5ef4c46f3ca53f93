"""A config from its file: YAML, overrides of single leaves (``a.b=c``), and one error that names every faulty field.

Unknown keys are refused, with a suggestion. Relative paths are taken from the config's folder.
"""

from __future__ import annotations

import difflib
import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ideal.config.config import Config
from ideal.config.inputs import Section, Source
from ideal.config.roots import stay_inside
from ideal.config.yaml_file import tree_of
from ideal.errors import BadInput

Place = tuple[str | int, ...]
"""Where a value stands in a config: keys, and numbers in lists."""


@dataclass(frozen=True)
class Given:
    """What a user gave, before it is checked.

    Attributes:
        tree: the file's settings with the overrides in their places.
        overridden: these places.
    """

    tree: dict[str, Any]
    overridden: list[Place]


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config, apply ``a.b=c`` overrides, and check it whole.

    Relative paths in it are taken from the config file's folder.

    Raises:
        BadInput: no such file, not YAML, or a field that doesn't hold; all faulty fields are named.
    """
    return parse(read(path, overrides).tree, str(path), Path(path).parent)


def read(path: str | Path, overrides: list[str] | None = None) -> Given:
    """The settings of a YAML file, and of ``a.b=c`` overrides.

    Raises:
        BadInput: no such file, not YAML, or an override that names no field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(str(path), f"can't be read ({error})", "name a YAML config file") from None
    try:
        tree = tree_of(text)
    except yaml.YAMLError as error:
        raise BadInput(str(path), f"is not YAML: {' '.join(str(error).split())}", "mend the line named") from None
    if not isinstance(tree, dict):
        raise BadInput(str(path), "holds no settings", "start from jobs/configs/your-data.yaml")
    tree = _unshared(tree)
    return Given(tree, [_override(tree, override) for override in overrides or []])


def parse(tree: dict[str, Any], where: str, folder: Path) -> Config:
    """Check a tree of settings.

    Raises:
        BadInput: a field doesn't hold; all faulty fields are named.
    """
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise BadInput(where, "\n  ".join(problems), "mend the fields above") from None
    absolute = _absolute(config, folder)
    stay_inside(absolute)
    return absolute


def _absolute(config: Config, folder: Path) -> Config:
    """The config with every path in it absolute: workers and jobs run in other folders."""

    def at(path: str) -> str:
        return os.path.normpath(Path(folder).absolute() / Path(path).expanduser())

    def source(s: Source) -> Source:
        return s.model_copy(update={"files": [at(f) for f in s.files]}) if s.files else s

    domains = [
        d.model_copy(update={"train": source(d.train), "reference": source(d.reference)}) for d in config.domains
    ]
    benchmarks = [b.model_copy(update={"include": at(b.include)}) if b.include else b for b in config.benchmarks]
    model = config.model
    if model.source.startswith((".", "/", "~")):
        model = model.model_copy(update={"source": at(model.source)})
    if model.made:
        made = model.made.model_copy(update={"corpus": [source(s) for s in model.made.corpus]})
        model = model.model_copy(update={"made": made})
    if model.chat_template:
        model = model.model_copy(update={"chat_template": at(model.chat_template)})
    return config.model_copy(update={"domains": domains, "benchmarks": benchmarks, "model": model})


def _unshared(value: Any) -> Any:
    """A copy in which what YAML's aliases repeat stands apart, so that an override changes one of them."""
    if isinstance(value, dict):
        return {key: _unshared(each) for key, each in value.items()}
    return [_unshared(each) for each in value] if isinstance(value, list) else value


def _override(tree: dict[str, Any], override: str) -> Place:
    """Change one value of a tree; says where it stands."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise BadInput(f"--set {override}", "is not of the form a.b=c", "e.g. --set equilibrium.m=0.3")
    *parents, leaf = key.strip().split(".")
    node: Any = tree
    place: Place = ()
    try:
        parsed = tree_of(value)
        for part in parents:
            step = _step(node, part)
            if isinstance(node, dict) and node.get(step) is None:
                node[step] = {}
            node, place = node[step], (*place, step)
        step = _step(node, leaf)
        node[step] = parsed
    except (yaml.YAMLError, AttributeError, TypeError, KeyError, IndexError, ValueError):
        raise BadInput(
            f"--set {override}", "names no field", "use the config's own keys; lists by name or number"
        ) from None
    return (*place, step)


def _step(node: Any, part: str) -> Any:
    """A key of a mapping; of a list, the place of the element with this `name` or number."""
    if not isinstance(node, list):
        return part
    names = [item.get("name") if isinstance(item, dict) else None for item in node]
    return names.index(part) if part in names else range(len(node))[int(part)]


def _explain(problem: Any) -> str:
    """One line for one of pydantic's errors, with a suggestion for a mistyped key."""
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{location}: {message}" if location else message
    section = _section_at(problem["loc"][:-1])
    known = list(section.model_fields) if section else []
    close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(known)}"
    return f"{location}: unknown key; {hint}"


def _section_at(location: tuple[Any, ...]) -> type[Section] | None:
    """The section of the tree that a pydantic error location points into."""
    section: type[Section] = Config
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *typing.get_args(annotation)]
        found = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
        if found is None:
            return None
        section = found
    return section
