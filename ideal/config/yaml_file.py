"""YAML with limits: what a person writes as a config, and nothing that hangs, overflows or means two things.

Plain YAML lets a file of a few lines expand to billions of values (aliases of aliases), takes the second of two equal
keys without a word, and raises errors of a dozen kinds for dates, numbers and depths that can't be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

LARGEST = 1_000_000
"""Characters of a file."""
MOST = 100_000
"""Values, each counted as often as aliases repeat it."""


def tree_of(text: str) -> Any:
    """The tree that a YAML text stands for.

    Raises:
        yaml.YAMLError: it isn't YAML, has a key twice, a value that can't be, or is beyond a limit; with its line.
    """
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"it has {len(text):,} characters, more than {LARGEST:,}")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:
            raise yaml.MarkedYAMLError(problem=f"no such value: {error}", problem_mark=node.start_mark) from None


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for.

    Args:
        known: those of nodes that were counted; 0 of one that is being counted, which can't hold itself.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.MarkedYAMLError(problem="a value holds itself", problem_mark=node.start_mark)
        return known[id(node)]
    known[id(node)] = 0
    count = 1
    if isinstance(node, yaml.MappingNode):
        seen: set[tuple[str, str]] = set()
        for key, value in node.value:
            name = (key.tag, str(key.value))
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands here twice", problem_mark=key.start_mark)
            seen.add(name)
            count += _count(key, known) + _count(value, known)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_count(value, known) for value in node.value)
    if count > MOST:
        raise yaml.MarkedYAMLError(problem=f"it stands for more than {MOST:,} values", problem_mark=node.start_mark)
    known[id(node)] = count
    return count


def nodes_of(node: yaml.Node | None) -> Iterator[yaml.Node]:
    """A node and all below it, keys included, each once however often aliases repeat it."""
    waiting, seen = [node] if node else [], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        if isinstance(each, yaml.MappingNode):
            waiting += [part for pair in each.value for part in pair]
        elif isinstance(each, yaml.SequenceNode):
            waiting += each.value
