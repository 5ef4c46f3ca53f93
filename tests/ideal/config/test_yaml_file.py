"""What plain YAML takes without a word, hangs on, or raises a dozen kinds of errors for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ideal.config.file import load
from ideal.config.yaml_file import LARGEST, tree_of
from ideal.errors import BadInput

BOMB = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'lol'] * 9)}]" for n in range(12))
REFUSED = {
    "a key twice": ("sft: {epochs: 1}\nsft: {epochs: 2}", "'sft' stands here twice"),
    "an impossible date": ("name: 2026-13-45", "no such value"),
    "a number of 5,000 digits": (f"seed: {'9' * 5000}", "no such value"),
    "a tag that doesn't fit": ("seed: !!int abc", "no such value"),
    "a tag of Python's": ("seed: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    "a depth of 3,000": ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    "aliases of aliases": (BOMB, "more than 100,000 values"),
    "a value that holds itself": ("a: &a [*a]", "holds itself"),
    "a file without an end": ("#" * (LARGEST + 1), "characters"),
}


@pytest.mark.parametrize(("text", "said"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_in_a_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(BadInput) as problem:
        load(tmp_path / "c.yaml")
    assert said in problem.value.what
    assert "\n" not in problem.value.what


@pytest.mark.parametrize("text", ["seed: 2026-13-45", "a: &x 1\nb: *x\nc: {<<: {d: 1}, d: 2}", "", "[1, {a: b}]"])
def test_everything_else_is_as_ever(text: str) -> None:
    try:
        wanted = yaml.safe_load(text)
    except ValueError:
        with pytest.raises(yaml.YAMLError, match="line 1"):
            tree_of(text)
    else:
        assert tree_of(text) == wanted


def test_an_override_has_the_same_limits(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("name: x")
    with pytest.raises(BadInput, match="--set"):
        load(tmp_path / "c.yaml", [f"seed={'[' * 3000}"])
