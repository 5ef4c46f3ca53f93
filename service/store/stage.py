"""A step of a run as a value: a class for each kind, an instance for each step, named by what its work reads.

A stage's fields are all that its result depends on. Its fingerprint is the hash of its kind, its version and these
fields; where and how fast it runs is told to ``run`` alone, and can't enter the name. Two runs that want the same
step have the same value, so it happens once.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel

R_co = TypeVar("R_co", bound=Mapping[str, Any], covariant=True)
T = TypeVar("T")


@dataclass(frozen=True)
class Record(Generic[R_co]):
    """A stage that has happened; another stage's input is one.

    Attributes:
        fingerprint: what stages that read it are named by.
        result: its small numbers, JSON-like.
        seconds: how long it ran.
        fresh: whether it ran now, not before.
    """

    kind: str
    fingerprint: str
    folder: Path
    result: R_co
    seconds: float
    fresh: bool


@dataclass(frozen=True)
class Identified(Generic[T]):
    """A value of which not everything counts: files count by their content, not by where they lie.

    Attributes:
        identity: what counts, JSON-like.
    """

    value: T
    identity: Any


@dataclass(frozen=True, kw_only=True)
class Stage(ABC, Generic[R_co]):
    """A step of a run; its subclasses' fields are what its result depends on.

    Attributes:
        kind: its name in fingerprints, folders and messages.
        version: raised when new code gives another result, so that old records are not taken for new ones.
    """

    kind: ClassVar[str]
    version: ClassVar[int]

    @abstractmethod
    def run(self, folder: Path, on: Any) -> R_co:
        """Do the work.

        Args:
            folder: where its files go; what a retry can go on from goes to ``folder / WORK``.
            on: the workers (``service.stages.workers.Workers``).
        """

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Every field in a stable form.

        Raises:
            TypeError: a field has none.
        """
        return {each.name: stable(getattr(self, each.name), f"{self.kind}.{each.name}") for each in fields(self)}

    @cached_property
    def fingerprint(self) -> str:
        """20 hexadecimal digits."""
        whole = {"kind": self.kind, "version": self.version, "fields": self.identity}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:20]


def stable(value: Any, where: str) -> Any:
    """A value as JSON that is the same in every process and on every machine.

    Args:
        where: what the value is, for the error.

    Raises:
        TypeError: it has no such form: paths, sets, numbers that aren't finite, and objects that nobody has thought of.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float() if math.isfinite(value):
            return value
        case Record():
            return value.fingerprint
        case Identified():
            return stable(value.identity, where)
        case BaseModel():
            return value.model_dump(mode="json")
        case Mapping() if all(isinstance(key, str) for key in value):
            return {key: stable(each, f"{where}.{key}") for key, each in value.items()}
        case list() | tuple():
            return [stable(each, f"{where}.{number}") for number, each in enumerate(value)]
    raise TypeError(f"{where}: {value!r} has no stable form, so no stage can be named by it")
