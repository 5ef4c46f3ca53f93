"""Conversations in the forms that data sets have them in, as chat messages.

A form is read only where its meaning is certain. What the model would have to be taught differently for (tools, images,
a turn by somebody else) and what isn't read here makes its row unusable, by name: left out, it would be taught to say
less than the data does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ideal.data.chat import REASONING, ROLES, Message, Unusable

NAMES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
}
"""Roles by the names that ShareGPT, Gemini and newer OpenAI models give them."""
TOOL_ROLES = ("tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython")
UNREAD_IN_TURNS = ("tool_calls", "tool_call_id", "function_call", "images", "audio")
UNREAD_IN_ROWS = ("tools", "functions", "chat_template_kwargs", "image", "images", "videos", "audios")
MASKS = ("train", "loss", "weight")
"""Keys that say of a turn whether it is trained on, as Axolotl, ms-swift and OpenAI name them."""
NOTHING: tuple[Any, ...] = (None, "", "[]", "{}", "null", [], {})


def check_row(row: Mapping[str, Any]) -> None:
    """Check that a row has nothing beside its conversation that belongs to it and isn't read.

    Raises:
        Unusable: it has.
    """
    for name in UNREAD_IN_ROWS:
        if row.get(name) not in NOTHING:
            raise Unusable(f"has `{name}`, which isn't read")


def turns(value: Any) -> list[Message]:
    """The messages of a list of turns, or of such a list as JSON text.

    Raises:
        Unusable: it is none, or has what isn't read.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Unusable("malformed: `messages` is no list of messages") from None
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Unusable("malformed: `messages` is no list of messages")
    found = [_message(turn) for turn in value]
    names = {str(_one(turn, "role", "from")).strip().lower() for turn in value}
    if {"system", "developer"} <= names:
        raise Unusable("has both a system and a developer message")
    return found


def spoken(value: Any, role: str) -> list[Message]:
    """A prompt or a completion: messages if it is a list of them, else the text of one message of this role."""
    items = value if isinstance(value, list) else []
    if items and all(isinstance(each, dict) and {"role", "from"} & set(each) for each in items):
        return turns(value)
    return [{"role": role, "content": text(value)}]


def text(content: Any) -> str:
    """A content as text: itself, a number's digits, or its text parts one after the other, as templates write them.

    Raises:
        Unusable: it is nothing of that, or has a part that is no text.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, int | float) and not isinstance(content, bool):
        written = repr(content)
        if math.isfinite(content) and "e" not in written:
            return written
    if isinstance(content, list) and content:
        return "".join(map(_part, content))
    raise Unusable("malformed: content that is no text")


def talks_before(history: Any) -> list[Message]:
    """Alpaca's `history`: pairs of what was asked and answered before.

    Raises:
        Unusable: it holds something else.
    """
    if history in NOTHING:
        return []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise Unusable("malformed: `history` is no list of pairs")
    return [
        message
        for asked, answered in history
        for message in (
            {"role": "user", "content": text(asked)},
            {"role": "assistant", "content": text(answered)},
        )
    ]


def _message(turn: dict[str, Any]) -> Message:
    name = _one(turn, "role", "from")
    role = NAMES.get(name.strip().lower()) if isinstance(name, str) else None
    if isinstance(name, str) and name.strip().lower() in TOOL_ROLES:
        raise Unusable(f"has a turn by a `{name.strip().lower()}`, which isn't read")
    if role is None:
        raise Unusable(f"malformed: a role that is none of {', '.join(ROLES)}")
    for key in UNREAD_IN_TURNS:
        if turn.get(key) not in NOTHING:
            raise Unusable(f"has `{key}`, which isn't read")
    found: Message = {"role": role, "content": text(_one(turn, "content", "value"))}
    for key in REASONING:
        if turn.get(key) not in NOTHING:
            if role != "assistant" or not isinstance(turn[key], str):
                raise Unusable(f"malformed: `{key}` that isn't an answer's text")
            found[key] = turn[key]
    if not _trained(turn, role):
        found["train"] = False
    return found


def _one(turn: dict[str, Any], name: str, other: str) -> Any:
    """What stands under one of two names."""
    first, second = turn.get(name), turn.get(other)
    if first is not None and second is not None and first != second:
        raise Unusable(f"malformed: `{name}` and `{other}` in one turn")
    return second if first is None else first


def _trained(turn: dict[str, Any], role: str) -> bool:
    """Whether a turn may be trained on, if it is an answer."""
    found = {}
    for key in MASKS:
        if (value := turn.get(key)) is not None:
            if value not in (0, 1):
                raise Unusable(f"a turn's `{key}` is neither 0 nor 1")
            if value and role != "assistant":
                raise Unusable(f"`{key}` asks for training on a turn that is no answer")
            found[key] = bool(value)
    return all(found.values()) or role != "assistant"


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        kind = part.get("type", "text")
        if kind == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        if isinstance(kind, str) and kind != "text" and kind.isidentifier() and len(kind) <= 20:
            raise Unusable(f"content with a part of type `{kind}`, which isn't read")
    raise Unusable("malformed: content that is no text")
