"""The Python that an lm-eval task brings along, found without running any of it.

A task file names functions (`!function module.name`) and classes (`class:`), which lm-eval imports as it loads the
task: a file beside it, or any module that Python finds, `os.system` included. They run with all rights of the user.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lm_eval.tasks
import yaml

from ideal.config.yaml_file import nodes_of

TASKS = Path(lm_eval.tasks.__file__).parent
RUN_ANSWERS = {"cruxeval", "longproc", "score/math"}
"""lm-eval's folders whose code evaluates or compiles what the model writes by itself, where no sandbox can be put."""


def own_functions(path: Path) -> list[str]:
    """What a task file, or one that it includes, names that isn't lm-eval's own."""
    return [named for named, folder in _named(path) if _in_lm_eval(named, folder) is None]


def runs_answers(path: Path) -> bool:
    """Whether a task file's code runs what the model writes with all rights of the user."""
    places = [path.resolve(), *(place for named, folder in _named(path) if (place := _in_lm_eval(named, folder)))]
    return any(place.is_relative_to(TASKS / folder) for place in places for folder in RUN_ANSWERS)


def _in_lm_eval(named: str, folder: Path) -> Path | None:
    """The file in lm-eval that a name means, if it means one; a file beside the task comes first, as lm-eval has it."""
    module = named.rpartition(".")[0].replace(".", "/")
    beside = (folder / f"{module}.py").resolve()
    place = beside if beside.exists() else TASKS.parents[1] / f"{module}.py"
    return place if place.is_relative_to(TASKS) and place.exists() else None


def _named(path: Path) -> Iterator[tuple[str, Path]]:
    """Functions and classes in a task file and in those that it includes, each with the folder of its file."""
    waiting, seen = [path.resolve()], set()
    while waiting:
        file = waiting.pop()
        if file in seen or not file.exists():
            continue
        seen.add(file)
        for node in nodes_of(yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)):
            if node.tag == "!function":
                yield str(node.value), file.parent
            if isinstance(node, yaml.MappingNode):
                settings = {key.value: value for key, value in node.value}
                if isinstance(settings.get("class"), yaml.ScalarNode) and settings["class"].tag != "!function":
                    yield settings["class"].value, file.parent
                included = settings.get("include")
                for each in nodes_of(included) if included else []:
                    if isinstance(each, yaml.ScalarNode):
                        waiting.append((file.parent / each.value).resolve())
