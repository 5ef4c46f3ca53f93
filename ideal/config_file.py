"""A config from its file: YAML, overrides of single leaves (``a.b=c``), and one error that names every faulty field.

Unknown keys are refused, with a suggestion. Relative paths are taken from the config's folder.
"""

from __future__ import annotations

import difflib
import os
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ideal.config import Config
from ideal.config_inputs import Section, Source
from ideal.errors import BadInput
from ideal.roots import stay_inside
from ideal.yaml_file import tree_of


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config, apply ``a.b=c`` overrides, and check it whole.

    Relative paths in it are taken from the config file's folder.

    Raises:
        BadInput: no such file, not YAML, or a field that doesn't hold; all faulty fields are named.
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
    for override in overrides or []:
        _override(tree, override)
    return parse(tree, str(path), path.parent)


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
    if model.chat_template:
        model = model.model_copy(update={"chat_template": at(model.chat_template)})
    return config.model_copy(update={"domains": domains, "benchmarks": benchmarks, "model": model})


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise BadInput(f"--set {override}", "is not of the form a.b=c", "e.g. --set equilibrium.m=0.3")
    *parents, leaf = key.strip().split(".")
    node: Any = tree
    try:
        parsed = tree_of(value)
        for part in parents:
            if isinstance(node, list):
                node = _item(node, part)
            else:
                child = node.get(part)
                node[part] = child = {} if child is None else child
                node = child
        if isinstance(node, list):
            node[node.index(_item(node, leaf))] = parsed
        else:
            node[leaf] = parsed
    except (yaml.YAMLError, AttributeError, TypeError, KeyError, IndexError, ValueError):
        raise BadInput(
            f"--set {override}", "names no field", "use the config's own keys; lists by name or number"
        ) from None


def _item(items: list[Any], key: str) -> Any:
    """An element of a list by its number or by its `name`."""
    named = [item for item in items if isinstance(item, dict) and item.get("name") == key]
    return named[0] if named else items[int(key)]


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
