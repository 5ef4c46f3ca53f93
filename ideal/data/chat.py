"""From chat messages to token ids and the positions that are trained on.

The model's own chat template decides the text. A conversation is cut where an assistant's answer begins (what the
template renders with ``add_generation_prompt``) and where it ends. The ids of a prompt are exactly those that the
model sees when it is asked, whatever the tokenizer would merge across the border; an answer's are those that go on from
there. Supervised are the answer's tokens and the end token behind it; nothing else. Where a template rewrites earlier
turns (drops their thoughts), no one text holds all answers as they were asked for: the row becomes several examples.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ideal.data.time_limit import in_time
from ideal.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""`role` and `content`; of an answer, too, one of ``REASONING``, and `train` where it isn't to be trained on."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""What an answer's thoughts are called beside its content."""
ROLES = ("system", "user", "assistant")
PATIENCE = 30.0
"""Seconds of processor time for a template to write one row: nested loops in one can take longer than anybody waits."""
OVERDUE_ROWS = 10
"""Rows that take longer, until the template is refused."""


class Unusable(Exception):
    """A row that can't be an example; its text is the reason, short enough to count by."""


@dataclass(frozen=True)
class Example:
    """One conversation: its token ids, which of them are supervised, its users' words, and the messages it is of."""

    ids: list[int]
    supervised: list[bool]
    prompt: str
    messages: list[Message] = field(default_factory=list)


class ChatEncoder:
    """Turns messages into examples with one tokenizer's template.

    Raises:
        BadInput: the tokenizer has no eos token or no chat template, or one that can't be cut into prompts and answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        if not tokenizer.chat_template:
            raise BadInput(
                "model.source",
                "its tokenizer has no chat template",
                "use an instruct model, or set model.chat_template to a Jinja file",
            )
        if tokenizer.eos_token_id is None:
            raise BadInput("model.source", "its tokenizer names no eos token", "add it to tokenizer_config.json")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = set(tokenizer.all_special_ids) | set(added)
        self._special_text = sorted({*map(str, tokenizer.all_special_tokens), *added.values()} - {""})
        self._too_long = f"longer than max_tokens ({max_tokens})"
        self._overdue = 0
        self._check_template()

    def encode(self, messages: list[Message]) -> list[Example]:
        """Token ids and masks of a conversation: one example, or more where the template rewrites earlier turns.

        Args:
            messages: roles system, user, assistant.

        Raises:
            Unusable: empty, malformed, too long, without anything to learn, with thoughts that the template drops, or
                one that the template takes too long on.
            BadInput: the template took too long on ``OVERDUE_ROWS`` rows.
        """
        _check(messages, self._special_text)
        if len(messages) > self.max_tokens:  # each takes a token or more, and the template as long as all before it
            raise Unusable(self._too_long)
        found: list[Example] = []
        ids: list[int] = []
        supervised: list[bool] = []
        done = after = first = 0  # ids up to the last end token, turns up to it, and the example's first answer
        deadline = time.thread_time() + PATIENCE
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                prompt, answered = self._render_turn(messages, turn, deadline)
            except TimeoutError:
                raise self._gives_up() from None
            except TemplateError:  # roles in another order than it knows, or a system message
                raise Unusable("the chat template refuses it") from None
            except Exception as error:  # a template can raise anything, and its row is to blame, not the run
                raise Unusable(f"the chat template fails on it ({type(error).__name__})") from None
            if not answered.startswith(prompt):
                raise Unusable("the chat template's prompt is no beginning of the answered conversation")
            text = answered[len(prompt) :]
            for name in REASONING:
                thought = message.get(name, "").strip()
                if thought and text.count(thought) <= message["content"].count(thought):
                    raise Unusable(f"the chat template drops its `{name}`")
            before, answer = self._cut(prompt, answered)
            if before[:done] != ids[:done]:
                found += _examples(ids, supervised, messages[:after], first)
                done, first = 0, turn
            end = self._end(answer, text, message["content"])
            trained = message.get("train", True)
            supervised = supervised[:done] + [False] * (len(before) - done)
            supervised += [trained and i <= end for i in range(len(answer))]
            ids, done, after = before + answer, len(before) + end + 1, turn + 1
            if len(ids) > self.max_tokens:
                raise Unusable(self._too_long)
        found += _examples(ids, supervised, messages if not found else messages[:after], first)
        if not found:
            raise Unusable("no supervised token")
        return found

    def _render_turn(self, messages: list[Message], turn: int, deadline: float) -> tuple[str, str]:
        """The text up to an answer, and with it.

        Raises:
            TimeoutError: the template takes until then, as ``in_time`` has it.
        """
        return in_time(lambda: (self._render(messages[:turn], ask=True), self._render(messages[: turn + 1])), deadline)

    def _gives_up(self) -> Unusable | BadInput:
        self._overdue += 1
        if self._overdue < OVERDUE_ROWS:
            return Unusable(f"the chat template takes more than {PATIENCE:.0f} s on it")
        return BadInput(
            "model.source",
            f"its chat template takes more than {PATIENCE:.0f} s on each of {self._overdue} rows",
            "mend the template",
        )

    def _render(self, messages: list[Message], ask: bool = False) -> str:
        text: Any = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        return str(text)

    def _ids(self, text: str) -> list[int]:
        try:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # tokenizers have no error of their own
            raise Unusable(f"the tokenizer fails on it ({type(error).__name__})") from None

    def _cut(self, prompt: str, answered: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt as the model is asked with it, and of what follows it."""
        asked, whole = self._ids(prompt), self._ids(answered)
        if whole[: len(asked)] == asked:
            return asked, whole[len(asked) :]
        line, text = self._ids("\n"), answered[len(prompt) :]  # by itself, a text may be given a blank to begin with
        after = self._ids("\n" + text)
        return asked, after[len(line) :] if after[: len(line)] == line else self._ids(text)

    def _end(self, answer: list[int], text: str, content: str) -> int:
        """Position of the end token: the first special token behind the answer's content, wherever that begins."""
        special = [i for i, token in enumerate(answer) if token in self._special]
        if text.endswith(self._tail) and len(special) >= self._tail_specials:
            return special[-self._tail_specials]
        lead, found, _ = text.partition(content.strip())
        skip = sum(token in self._special for token in self._ids(lead)) if found and lead else 0
        return special[skip] if skip < len(special) else len(answer) - 1

    def _check_template(self) -> None:
        question: list[Message] = [{"role": "user", "content": "Are you there?"}]
        answer: list[Message] = [{"role": "assistant", "content": "Yes."}]
        try:
            prompt, answered = self._render_turn(question + answer, 1, time.thread_time() + PATIENCE)
        except TimeoutError:
            raise BadInput(
                "model.source", f"its chat template takes more than {PATIENCE:.0f} s for two lines", "mend the template"
            ) from None
        except Exception as error:  # Jinja raises whatever the template's author chose
            raise BadInput("model.source", f"its chat template fails: {error}", "mend the template") from None
        self._tail = answered[len(prompt) :].partition("Yes.")[2]
        ends = [token for token in self._ids(self._tail) if token in self._special]
        if not answered.startswith(prompt):
            raise BadInput(
                "model.source",
                "its chat template's prompt is no prefix of the answered conversation",
                "set model.chat_template to a template without added thoughts",
            )
        if not ends:
            raise BadInput(
                "model.source",
                "its chat template ends an answer without an end token, so the model would never learn to stop",
                "set model.chat_template to a template that writes the end token",
            )
        self.end_token, self._tail_specials = ends[0], len(ends)


def _examples(ids: list[int], supervised: list[bool], messages: list[Message], first: int) -> list[Example]:
    """The example of a talk whose answers from turn ``first`` on are trained on, if any of it is."""
    if not any(supervised[1:]):
        return []
    learned = [m | {"train": False} if m["role"] == "assistant" and n < first else m for n, m in enumerate(messages)]
    return [Example(ids, supervised, "\n".join(m["content"] for m in messages if m["role"] == "user"), learned)]


def _check(messages: list[Message], special: list[str]) -> None:
    if not messages:
        raise Unusable("empty")
    for message in messages:
        content = message.get("content")
        if message.get("role") not in ROLES:
            raise Unusable(f"malformed: a role that is none of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise Unusable("malformed: content that is no text")
        if not content.strip() and message["role"] != "system":
            raise Unusable("empty")
        said = "".join(message.get(key, "") for key in ("content", *REASONING))
        if any("\ud800" <= letter <= "\udfff" for letter in said):
            raise Unusable("half a character (a lone surrogate)")
        if any(token in said for token in special):
            raise Unusable("contains the template's own special tokens")
    if not any(m["role"] == "assistant" for m in messages):
        raise Unusable("no supervised token")
    if next(m["role"] for m in messages if m["role"] != "system") == "assistant":
        raise Unusable("an assistant opens it")
