"""The settings that a user sees are those of ``settings.txt``: none comes, goes or changes its name unnoticed.

``python -m tests.ideal.config.test_settings`` renews that file.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ideal.config.config import Config
from ideal.config.inputs import Section

FILE = Path(__file__).with_name("settings.txt")
RENEW = "python -m tests.ideal.config.test_settings"


def parts(annotation: Any) -> Iterator[Any]:
    """A type and all that it is made of."""
    yield annotation
    for part in typing.get_args(annotation):
        yield from parts(part)


def names(section: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted name of every setting; what stands in a list or may be left out is named once."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for part in parts(field.annotation):
            if isinstance(part, type) and issubclass(part, Section):
                yield from names(part, f"{prefix}{name}.")


def test_the_settings_are_those_that_were_agreed_on() -> None:
    listed, there = set(FILE.read_text().split()), set(names(Config))
    changes = [*(f"+ {name}" for name in sorted(there - listed)), *(f"- {name}" for name in sorted(listed - there))]
    assert not changes, (
        "settings came (+) or went (-):\n  "
        + "\n  ".join(changes)
        + f"\nWhere that is meant, `{RENEW}` renews {FILE.name}. Every new setting needs a reason: its field's "
        "description says what a user gains by changing it."
    )


def test_the_list_is_sorted_and_names_each_once() -> None:
    listed = FILE.read_text().split()
    assert listed == sorted(set(listed))
    assert {"seed", "sft", "sft.lora.rank", "domains.train.files", "model.made.corpus.hub"} <= set(listed)


if __name__ == "__main__":
    FILE.write_text("\n".join(sorted(set(names(Config)))) + "\n")
