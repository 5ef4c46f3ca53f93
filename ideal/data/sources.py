"""Rows from where they are kept (local files, a hub dataset, procedural tasks) as chat messages.

Every row remembers where it stood, so that a faulty one is reported with its file and line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ideal.config.inputs import Source
from ideal.data.chat import Message, Unusable
from ideal.data.conversations import check_row, spoken, talks_before, text, turns
from ideal.data.row_files import files_of, pick, rows_of
from ideal.errors import BadInput
from ideal.mixture import seeded

REQUIRED = {"chat": ["messages"], "prompt": ["prompt", "completion"], "instruction": ["instruction", "output"]}
ALSO = {"messages": ("conversations", "conversation"), "system": ("system_prompt",)}
"""Other usual names of a column, where `fields` names none."""

Row = tuple[str, dict[str, Any] | None]
"""Where it stands (``file:line``), and its columns; None where the line can't be parsed."""


def rows(source: Source, where: str) -> Iterator[Row]:
    """All rows of a source, in order; ``source.size`` and ``source.rows`` limit them.

    Raises:
        BadInput: a missing or unreadable file, an unknown task or dataset, no network for a hub dataset.
    """
    found = (
        _made(source, where) if source.reasoning_gym else _hub(source, where) if source.hub else _local(source, where)
    )
    if source.wrong:
        found = _with_wrong_answers(found, source)
    limit = None if source.reasoning_gym else source.size
    for number, row in enumerate(found):
        if limit is not None and number >= limit:
            return
        yield row


def messages(row: dict[str, Any] | None, source: Source) -> list[Message]:
    """A row as chat messages.

    Raises:
        Unusable: the row isn't what the format needs, or, where the config names none, fits no format.
    """
    if row is None:
        raise Unusable("malformed: no JSON object")
    if set(row) == {"messages"} and isinstance(row["messages"], list):  # already a chat: its answer was changed
        source = source.model_copy(update={"format": "chat", "fields": {}})
    form = source.format if source.format != "auto" else _detect(row, source)
    check_row(row)
    value = {name: _column(row, name, source) for name in [*REQUIRED[form], "input", "history", "system"]}
    for name in REQUIRED[form]:
        if value[name] is None:
            raise Unusable(f"malformed: no `{source.fields.get(name, name)}`")
    if form == "chat":
        talk = turns(value["messages"])
    elif form == "prompt":
        asked, answered = spoken(value["prompt"], "user"), spoken(value["completion"], "assistant")
        talk = [m | {"train": False} if m["role"] == "assistant" else m for m in asked] + answered
    else:
        question, more = text(value["instruction"]), value["input"]
        if more is not None and (more := text(more)).strip():
            question = f"{question}\n\n{more}"
        talk = [*talks_before(value["history"]), *spoken(question, "user"), *spoken(value["output"], "assistant")]
    return _with_system(talk, value["system"], source.system)


def _with_system(talk: list[Message], own: Any, default: str | None) -> list[Message]:
    """A talk that begins with its system message: one of its own, else its row's, else the source's."""
    beside = None if own is None else text(own)
    if talk and talk[0]["role"] == "system":
        if beside and beside != talk[0]["content"]:
            raise Unusable("has two system messages, one of them beside the conversation")
        return talk
    system = default if beside is None else beside
    return [{"role": "system", "content": system}, *talk] if system else talk


def _column(row: dict[str, Any], name: str, source: Source) -> Any:
    """What stands in a format's column; None where nothing does."""
    if name in source.fields:
        return pick(row, source.fields[name])
    return next((found for each in (name, *ALSO.get(name, ())) if (found := row.get(each)) is not None), None)


def _local(source: Source, where: str) -> Iterator[Row]:
    start, stop = source.rows or (0, None)
    for path in files_of(source, where):
        for count, (number, row) in enumerate(rows_of(path, source.records, where)):
            if count >= start and (stop is None or count < stop):
                yield f"{path}:{number}", row if isinstance(row, dict) else None


def _hub(source: Source, where: str) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_dataset(source.hub, source.subset, split=source.split, streaming=source.size is not None)
        start, stop = source.rows or (0, None)
        for number, row in enumerate(data):
            if number >= start and (stop is None or number < stop):
                yield f"{source.hub}[{source.split}]:{number + 1}", dict(row)
    except BadInput:
        raise
    except Exception as error:  # the hub client raises a dozen kinds, all of them final here
        raise BadInput(
            f"{where}.hub",
            f"{source.hub} can't be loaded: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            "check its name, subset and split, the network, and `hf auth login` for a gated one",
        ) from None


def _made(source: Source, where: str) -> Iterator[Row]:
    import reasoning_gym

    try:
        made = reasoning_gym.create_dataset(source.reasoning_gym, size=source.size, seed=source.seed, **source.options)
    except (
        Exception
    ) as error:  # an unknown name is a ValueError, an unknown option a TypeError, a bad one an AssertionError
        raise BadInput(f"{where}.reasoning_gym", str(error) or "bad options", "see reasoning-gym's gallery") from None
    for number, entry in enumerate(made):
        yield (
            f"{source.reasoning_gym}[{source.seed}]:{number + 1}",
            {
                "prompt": entry["question"],
                "completion": str(entry["answer"]),
            },
        )


def _with_wrong_answers(found: Iterator[Row], source: Source) -> Iterator[Row]:
    """A share of the rows with the answer of another row, as prompts and completions; which ones is seeded."""
    talks: list[tuple[Row, list[Message]]] = []
    for place, row in found:
        try:
            talks.append(((place, row), messages(row, source)))
        except Unusable:
            talks.append(((place, row), []))
    usable = [number for number, (_, talk) in enumerate(talks) if talk]
    random = seeded(source.seed, "wrong")
    chosen = [usable[i] for i in random.permutation(len(usable))[: round(source.wrong * len(usable))]]
    answers = {n: talk[-1] for n, (_, talk) in enumerate(talks) if talk}
    swapped = dict(zip(chosen, [answers[n] for n in [*chosen[1:], *chosen[:1]]], strict=True))
    for number, (read, talk) in enumerate(talks):
        if talk:
            last = swapped.get(number, talk[-1]) | {"role": talk[-1]["role"]}
            yield read[0], {"messages": [*talk[:-1], last]}
        else:
            yield read


def _detect(row: dict[str, Any], source: Source) -> str:
    """The format that a row's columns fit; one that it has the columns of, and a null among them, if no other."""
    for form, needed in REQUIRED.items():
        if all(_column(row, name, source) is not None for name in needed):
            return form
    for form, needed in REQUIRED.items():
        if all(any(each in row for each in (name, *ALSO.get(name, ()))) for name in needed):
            return form
    raise Unusable(f"malformed: its columns ({', '.join(sorted(map(str, row))[:6])}) fit none of {', '.join(REQUIRED)}")
