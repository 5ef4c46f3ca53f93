"""From rows to domains: what was left out is counted, and what is held out isn't trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ideal.config.config import Config
from ideal.config.file import parse
from ideal.data.chat import ChatEncoder
from ideal.data.domains import Domain, encoded, prepare, starting_volumes
from ideal.errors import BadInput
from tests.tiny import make_tokenizer

ENCODER = ChatEncoder(make_tokenizer(), 64)


def config(folder: Path, train: list[Any], reference: list[Any] | None = None, **more: Any) -> Config:
    """Two domains: the first of these rows, the second of rows of its own."""
    sets = {
        "a.train": train,
        "a.reference": reference or questions("ra", 4),
        "b.train": questions("b", 6),
        "b.reference": questions("rb", 4),
    }
    for name, made in sets.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in made]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    domains = [{"name": d, **{part: {"files": [f"{d}.{part}.jsonl"]} for part in ("train", "reference")}} for d in "ab"]
    base: dict[str, Any] = {"name": "run", "domains": domains, "benchmarks": [{"name": "x", "task": "y"}]}
    base["influence"] = {"blocks": 2}
    return parse({**base, **more}, "c.yaml", folder)


def questions(name: str, n: int) -> list[dict[str, str]]:
    return [{"prompt": f"Question {name} {i}?", "completion": f"{i}"} for i in range(n)]


def found(domain: Domain) -> dict[str, Any]:
    return {"pool": len(domain.train), "reference": len(domain.reference), "account": domain.account}


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    bad: list[Any] = ["{", {"prompt": "q", "completion": " "}, {"prompt": "q", "completion": "long " * 70}]
    a, b = prepare(config(tmp_path, [*questions("a", 3), *bad, *questions("c", 2)], max_rejected=0.5), ENCODER, [])
    account = a.account["train"]
    assert (account["rows"], account["used"], account["overlapping"]) == (8, 5, 0)
    assert account["rejected"] == {"malformed: no JSON object": 1, "empty": 1, "longer than max_tokens (64)": 1}
    file = tmp_path / "a.train.jsonl"
    assert account["rejected_rows"][:2] == [f"{file}:4: malformed: no JSON object", f"{file}:5: empty"]
    assert (len(a.train), len(a.reference), len(b.train), b.account["train"]["rejected"]) == (5, 4, 6, {})


@pytest.mark.parametrize(("share", "stops"), [(0.19, True), (0.2, False)])
def test_too_many_unusable_rows_stop_the_run(tmp_path: Path, share: float, stops: bool) -> None:
    made = config(tmp_path, [*questions("a", 4), "{"], max_rejected=share)
    if not stops:
        prepare(made, ENCODER, [])
        return
    with pytest.raises(BadInput, match=r"domains.a.train: 1 of 5 rows") as raised:
        prepare(made, ENCODER, [])
    assert f"{tmp_path / 'a.train.jsonl'}:5: malformed" in str(raised.value)


def test_held_out_questions_are_removed_from_training_and_counted(tmp_path: Path) -> None:
    """Those of its own reference set, of another domain's, and of a benchmark; case and spacing don't hide them."""
    held = [
        {"prompt": "question  RA 2 ?", "completion": "x"},
        {"prompt": "Question rb 1?", "completion": "x"},
        {"prompt": "Question bench?", "completion": "x"},
        {"prompt": "Question bench 2?", "completion": "x"},
    ]
    a, b = prepare(config(tmp_path, [*questions("a", 3), *held]), ENCODER, ["question BENCH?\n", ""])
    assert a.account["train"]["overlapping"] == 3
    assert len(a.train) == a.account["train"]["used"] == 4
    assert (b.account["train"]["overlapping"], len(b.train)) == (0, 6)
    assert len(a.reference) == 4, "a reference set stays whole"


def test_a_domain_that_is_all_held_out(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"domains.a.train: holds nothing"):
        prepare(config(tmp_path, questions("ra", 3)), ENCODER, [])


def test_a_source_without_rows(tmp_path: Path) -> None:
    made = config(tmp_path, questions("a", 3))
    (tmp_path / "a.reference.jsonl").write_text("")
    with pytest.raises(BadInput, match=r"domains.a.reference: has no rows"):
        prepare(made, ENCODER, [])


def volumes(made: Config, **asked: int) -> Config:
    domains = [d.model_copy(update={"volume": asked.get(d.name)}) for d in made.domains]
    return made.model_copy(update={"domains": domains})


def test_starting_volumes(tmp_path: Path) -> None:
    made = config(tmp_path, [*questions("a", 9), {"prompt": "Question ra 1?", "completion": "x"}])
    prepared = {d.name: found(d) for d in prepare(made, ENCODER, [])}
    assert starting_volumes(made, prepared) == {"a": 9, "b": 6}
    assert starting_volumes(volumes(made, a=5), prepared) == {"a": 5, "b": 6}
    with pytest.raises(BadInput, match=r"domains.a.volume: asks for 10 .* gives 9 \(10 rows, 0 unusable, 1 also held"):
        starting_volumes(volumes(made, a=10), prepared)


@pytest.mark.parametrize(("blocks", "references", "part"), [(7, 8, "b.train"), (5, 4, "a.reference")])
def test_a_set_smaller_than_its_blocks(tmp_path: Path, blocks: int, references: int, part: str) -> None:
    made = config(tmp_path, questions("a", 9), questions("ra", references), influence={"blocks": blocks})
    with pytest.raises(BadInput, match=rf"domains.{part}: has \d examples, fewer than influence.blocks \({blocks}\)"):
        starting_volumes(made, {d.name: found(d) for d in prepare(made, ENCODER, [])})


def test_progress_names_every_domain(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    list(encoded(config(tmp_path, questions("a", 3)).domains, ENCODER, lambda *told_now: told.append(told_now)))
    assert told == [("a", 0, 2), ("b", 1, 2)]
