"""Conversations as data sets have them: read where what they mean is certain, else refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ideal.config.inputs import Source
from ideal.data.chat import Message, Unusable
from ideal.data.sources import messages, rows

ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = [ASKED, ANSWERED]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
SYSTEM = {"role": "system", "content": "s"}


def read(row: dict[str, Any], **settings: Any) -> list[Message]:
    return messages(row, Source(files=["x"], **settings))


def answered(**more: Any) -> dict[str, Any]:
    return {"messages": [ASKED, ANSWERED | more]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": SHAREGPT}, CHAT),
        ({"conversations": [{"from": "System", "value": "s"}, *SHAREGPT], "id": "7"}, [SYSTEM, *CHAT]),
        ({"conversations": SHAREGPT, "system": "s"}, [SYSTEM, *CHAT]),
        ({"conversations": CHAT, "system_prompt": "s"}, [SYSTEM, *CHAT]),
        ({"messages": [SYSTEM, *CHAT], "system": "s"}, [SYSTEM, *CHAT]),
        ({"messages": [{"role": "developer", "content": "s"}, *CHAT]}, [SYSTEM, *CHAT]),
        ({"messages": json.dumps(CHAT)}, CHAT),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWERED]}, CHAT),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "qr"]}, ANSWERED]},
         [{"role": "user", "content": "qr"}, ANSWERED]),
        ({"prompt": "q", "completion": 42}, [ASKED, {"role": "assistant", "content": "42"}]),
        ({"prompt": "q", "completion": 0.5}, [ASKED, {"role": "assistant", "content": "0.5"}]),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, CHAT),
        ({"prompt": [*CHAT, ASKED], "completion": "a"}, [ASKED, ANSWERED | {"train": False}, *CHAT]),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, CHAT * 2),
        (answered(tool_calls=[], reasoning_content=None, name=None), CHAT),
        (answered(reasoning_content="r"), [ASKED, ANSWERED | {"reasoning_content": "r"}]),
        (answered(weight=0), [ASKED, ANSWERED | {"train": False}]),
        (answered(loss=True, train=1), CHAT),
        ({"messages": CHAT, "tools": []}, CHAT),
    ],
)  # fmt: skip
def test_the_usual_forms(row: dict[str, Any], expected: list[Message]) -> None:
    assert read(row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": CHAT, "tools": [{"type": "function"}]}, "has `tools`, which isn't read"),
        ({"messages": CHAT, "tools": '[{"type": "function"}]'}, "has `tools`"),
        ({"messages": CHAT, "chat_template_kwargs": {"thinking": True}}, "has `chat_template_kwargs`"),
        ({"prompt": "q", "completion": "a", "images": ["x.png"]}, "has `images`"),
        ({"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "has `tool_calls`"),
        ({"messages": [*CHAT, {"role": "tool", "content": "rain"}]}, "has a turn by a `tool`"),
        ({"conversations": [*SHAREGPT, {"from": "observation", "value": "x"}]}, "has a turn by a `observation`"),
        ({"messages": [{"role": "robot", "content": "q"}, ANSWERED]}, "a role that is none of system, user, assistant"),
        ({"messages": [ASKED, ANSWERED | {"value": "b"}]}, "`content` and `value` in one turn"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWERED]}, "a part of type `image`"),
        ({"messages": [{"role": "user", "content": []}, ANSWERED]}, "content that is no text"),
        ({"messages": [{"role": "user", "content": True}, ANSWERED]}, "content that is no text"),
        ({"prompt": "q", "completion": 1e30}, "content that is no text"),
        ({"messages": [SYSTEM, *CHAT], "system": "other"}, "two system messages"),
        ({"messages": CHAT, "system": {"a": 1}}, "content that is no text"),
        ({"messages": [SYSTEM, {"role": "developer", "content": "d"}, *CHAT]}, "both a system and a developer message"),
        ({"messages": "no JSON"}, "no list of messages"),
        ({"instruction": "q", "output": "a", "history": ["q"]}, "`history` is no list of pairs"),
        (answered(weight=0.5), "a turn's `weight` is neither 0 nor 1"),
        (answered(reasoning_content=["r"]), "`reasoning_content` that isn't an answer's text"),
        ({"messages": [ASKED | {"train": True}, ANSWERED]}, "training on a turn that is no answer"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(row: dict[str, Any], reason: str) -> None:
    """Left out in silence, it would teach the model to say less than the data does."""
    with pytest.raises(Unusable) as problem:
        read(row)
    assert reason in str(problem.value)


def test_a_mapped_column_is_read_in_every_form() -> None:
    assert read({"talk": SHAREGPT}, fields={"messages": "talk"}) == CHAT
    assert read({"chosen": CHAT, "rejected": []}, fields={"messages": "chosen"}) == CHAT


def test_wrong_answers_come_with_their_thoughts_and_faulty_rows_keep_their_reason(tmp_path: Path) -> None:
    def row(name: str) -> dict[str, Any]:
        return {"talk": [ASKED, {"role": "assistant", "content": name, "reasoning_content": name}]}

    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (row("a"), {"talk": [], "tools": [1]}, row("b"))))
    source = Source(files=[str(path)], fields={"messages": "talk"}, wrong=1.0)
    first, faulty, last = (found for _, found in rows(source, "here"))
    swapped = [messages(found, source)[-1] for found in (first, last)]
    assert [(m["content"], m["reasoning_content"]) for m in swapped] == [("b", "b"), ("a", "a")]
    with pytest.raises(Unusable, match="has `tools`"):
        messages(faulty, source)
