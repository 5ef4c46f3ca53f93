"""What is trained on, exactly: the answers' tokens and the end tokens behind them, whatever the template does."""

from __future__ import annotations

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from ideal.data import chat
from ideal.data.chat import ChatEncoder, Example, Message, Unusable
from ideal.errors import BadInput
from ideal.training.pretraining import CHAT_TEMPLATE
from tests.tiny import make_tokenizer

TALK: list[Message] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 12 + 34?"},
    {"role": "assistant", "content": "46.\n"},
    {"role": "user", "content": "And backward?"},
    {"role": "assistant", "content": "64, the other way round"},
]
HARMONY = CHAT_TEMPLATE.replace(
    "+ message['content']", "+ ('<|lead|>final<|lead|>' if message['role'] == 'assistant' else '') + message['content']"
)
PICKY = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% macro twice(n) %}{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}{% endmacro %}{{ twice(60) }}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def test_answers_and_their_end_tokens_are_supervised_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    (found,) = ChatEncoder(tokenizer, 512).encode(TALK)
    spans: list[list[int]] = []
    for before, token, is_in in zip([False, *found.supervised], found.ids, found.supervised, strict=False):
        if is_in:
            spans += [[]] if not before else []
            spans[-1].append(token)
    assert [tokenizer.decode(span) for span in spans] == ["46.\n<|im_end|>", "64, the other way round<|im_end|>"]
    assert tokenizer.decode(found.ids) == tokenizer.apply_chat_template(TALK, tokenize=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [span[-1] for span in spans] == [end, end]
    assert not found.supervised[-1], "the newline behind the end token"
    assert found.prompt == "What is 12 + 34?\nAnd backward?"


@pytest.mark.parametrize("turn", [2, 4])
def test_a_prompt_is_what_the_model_sees_when_it_is_asked(tokenizer: PreTrainedTokenizerFast, turn: int) -> None:
    """However long it is: a mask at a fixed place would be wrong for all but one length."""
    (found,) = ChatEncoder(tokenizer, 512).encode(TALK[: turn + 1])
    asked = tokenizer.apply_chat_template(TALK[:turn], add_generation_prompt=True, return_dict=False)
    assert found.ids[: len(asked)] == asked
    assert found.supervised[len(asked)]
    assert not found.supervised[len(asked) - 1]


def test_a_merge_across_the_border_is_not_taken(tokenizer: PreTrainedTokenizerFast) -> None:
    """An answer's first letters could make one token with the prompt's last; the model is never asked that way."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the dog"}]
    asked = tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
    (found,) = ChatEncoder(tokenizer, 512).encode(talk)
    assert found.ids[: len(asked)] == asked
    whole = tokenizer.apply_chat_template(talk, return_dict=False)
    assert whole[: len(asked)] != asked, "the whole text at once would show"


@pytest.mark.parametrize(
    ("talk", "reason"),
    [
        ([], "empty"),
        ([{"role": "user", "content": " "}, TALK[2]], "empty"),
        ([TALK[1], {"role": "assistant", "content": "\n"}], "empty"),
        ([TALK[1], {"role": "assistant", "content": None}], "malformed"),
        ([{"role": "robot", "content": "Hi"}, TALK[2]], "malformed"),
        ([{"content": "Hi"}, TALK[2]], "malformed"),
        ([TALK[1]], "no supervised token"),
        ([TALK[1], {"role": "assistant", "content": "no <|im_end|> of it"}], "special tokens"),
        ([{"role": "user", "content": "<|endoftext|>"}, TALK[2]], "special tokens"),
        ([TALK[1], {"role": "assistant", "content": "la " * 60}], r"longer than max_tokens \(50\)"),
    ],
)
def test_what_can_not_be_used_says_why(tokenizer: PreTrainedTokenizerFast, talk: list[Message], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        ChatEncoder(tokenizer, 50).encode(talk)


def test_a_talk_of_more_turns_than_tokens_is_not_rendered(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn is rendered with all before it: a hundred thousand would take hours."""
    encoder = ChatEncoder(tokenizer, 50)
    monkeypatch.delattr(ChatEncoder, "_render")
    with pytest.raises(Unusable, match=r"longer than max_tokens \(50\)"):
        encoder.encode(TALK[1:3] * 50_000)


def test_a_template_that_loops_is_given_up(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.chat_template = ENDLESS
    monkeypatch.setattr(chat, "PATIENCE", 0.01)
    with pytest.raises(BadInput, match="takes more than 0 s for two lines"):
        ChatEncoder(tokenizer, 50)


@pytest.mark.parametrize("endless", [ENDLESS, DOUBLING], ids=["loops", "calls itself"])
def test_a_row_that_the_template_loops_on_is_given_up(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, endless: str
) -> None:
    """It alone, in whatever turn; what comes behind it is encoded as ever."""
    tokenizer.chat_template = f"{{% if messages[-1]['content'] == 'loop' %}}{endless}{{% endif %}}" + CHAT_TEMPLATE
    encoder = ChatEncoder(tokenizer, 512)
    whole = encoder.encode(TALK)
    with monkeypatch.context() as impatient:
        impatient.setattr(chat, "PATIENCE", 0.01)
        with pytest.raises(Unusable, match=r"^the chat template takes more than 0 s on it$"):
            encoder.encode([*TALK, {"role": "user", "content": "loop"}, TALK[2]])
    assert encoder.encode(TALK) == whole


def test_a_template_that_loops_on_many_rows_is_given_up(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes its time; a data set of them would take years."""
    encoder = ChatEncoder(tokenizer, 512)
    encoder.tokenizer.chat_template = ENDLESS
    monkeypatch.setattr(chat, "PATIENCE", 0.01)
    monkeypatch.setattr(chat, "OVERDUE_ROWS", 2)
    with pytest.raises(Unusable):
        encoder.encode(TALK)
    with pytest.raises(BadInput, match=r"model.source.*takes more than 0 s on each of 2 rows"):
        encoder.encode(TALK)


def test_an_answer_of_exactly_the_limit_is_used(tokenizer: PreTrainedTokenizerFast) -> None:
    n = len(ChatEncoder(tokenizer, 512).encode(TALK)[0].ids)
    ChatEncoder(tokenizer, n).encode(TALK)
    with pytest.raises(Unusable):
        ChatEncoder(tokenizer, n - 1).encode(TALK)


def test_special_tokens_before_the_answer_do_not_end_it(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|lead|>"]})
    tokenizer.chat_template = HARMONY
    (found,) = ChatEncoder(tokenizer, 512).encode(TALK[1:3])
    trained = [token for token, is_in in zip(found.ids, found.supervised, strict=True) if is_in]
    assert tokenizer.decode(trained) == "<|lead|>final<|lead|>46.\n<|im_end|>"


def test_added_words_that_are_not_special_do_not_end_an_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Some tokenizers add runs of spaces: the mask would end at a program's first indented line."""
    tokenizer.add_tokens(["    "])
    (found,) = ChatEncoder(tokenizer, 512).encode([TALK[1], {"role": "assistant", "content": "def f():\n    return 1"}])
    trained = [token for token, is_in in zip(found.ids, found.supervised, strict=True) if is_in]
    assert tokenizer.decode(trained) == "def f():\n    return 1<|im_end|>"


def test_a_special_token_without_a_name_is_refused_too(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("<|header|>", special=True)], special_tokens=True)
    with pytest.raises(Unusable, match="special tokens"):
        ChatEncoder(tokenizer, 512).encode([{"role": "user", "content": "<|header|>system"}, TALK[2]])


def test_a_tokenizer_without_an_end_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(BadInput, match="names no eos token"):
        ChatEncoder(tokenizer, 512)


def test_a_row_that_the_template_refuses_is_a_row_not_a_crash(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = PICKY
    encoder = ChatEncoder(tokenizer, 512)
    encoder.encode(TALK[1:])
    with pytest.raises(Unusable, match="refuses"):
        encoder.encode(TALK)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "no chat template"),
        ("{{ nonsense(", "fails"),
        (CHAT_TEMPLATE.replace("<|im_end|>", "END"), "without an end token"),
        (HARMONY.replace("<|lead|>final", "").replace("<|im_end|>", ""), "without an end token"),
        (CHAT_TEMPLATE.replace("<|im_start|>assistant\\n'", "<|im_start|>assistant\\nHmm'"), "no prefix"),
    ],
)
def test_templates_that_can_not_be_used(tokenizer: PreTrainedTokenizerFast, template: str | None, problem: str) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|lead|>"]})
    tokenizer.chat_template = template
    with pytest.raises(BadInput, match=f"model.source.*{problem}"):
        ChatEncoder(tokenizer, 512)


THINKING = """{% set last = namespace(at=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.at = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > last.at %}
{{- '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}
{{- m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""It drops earlier thoughts, as Qwen3's does."""


def trained(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    return str(tokenizer.decode([t for t, is_in in zip(example.ids, example.supervised, strict=True) if is_in]))


def test_where_a_template_rewrites_earlier_turns_each_answer_is_trained_as_it_is_asked_for(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = THINKING
    encoder = ChatEncoder(tokenizer, 512)
    talk = [*TALK[:4], TALK[4] | {"reasoning_content": "I turn it."}]
    first, second = encoder.encode(talk)
    assert trained(tokenizer, first) == "<think></think>46.\n<|im_end|>"
    assert trained(tokenizer, second) == "<think>I turn it.</think>64, the other way round<|im_end|>"
    for example, turn in ((first, 2), (second, 4)):
        asked = tokenizer.apply_chat_template(talk[:turn], add_generation_prompt=True, return_dict=False)
        assert example.ids[: len(asked)] == asked
    assert (first.prompt, second.prompt) == ("What is 12 + 34?", "What is 12 + 34?\nAnd backward?")
    for example in (first, second):
        assert encoder.encode(example.messages) == [example], "what is exported is what was trained on"


def test_what_a_template_writes_at_the_very_end_divides_no_talk(tokenizer: PreTrainedTokenizerFast) -> None:
    """As Phi-3's does: behind the end token, where nothing is trained on."""
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{% endif %}", "{% else %}{{ '<|endoftext|>' }}{% endif %}")
    (found,) = ChatEncoder(tokenizer, 512).encode(TALK)
    assert trained(tokenizer, found) == "46.\n<|im_end|>64, the other way round<|im_end|>"
    assert tokenizer.decode(found.ids) == tokenizer.apply_chat_template(TALK, tokenize=False)


@pytest.mark.parametrize("thought", ["I add them.", "46"])
def test_thoughts_that_a_template_drops_make_a_row_unusable(tokenizer: PreTrainedTokenizerFast, thought: str) -> None:
    talk = [TALK[1], TALK[2] | {"reasoning_content": thought}]
    with pytest.raises(Unusable, match="the chat template drops its `reasoning_content`"):
        ChatEncoder(tokenizer, 512).encode(talk)
    tokenizer.chat_template = THINKING
    (found,) = ChatEncoder(tokenizer, 512).encode(talk)
    assert trained(tokenizer, found) == f"<think>{thought}</think>46.\n<|im_end|>"


def test_answers_that_are_not_to_be_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = ChatEncoder(tokenizer, 512)
    (found,) = encoder.encode([*TALK[:2], TALK[2] | {"train": False}, *TALK[3:]])
    assert trained(tokenizer, found) == "64, the other way round<|im_end|>"
    assert found.ids == encoder.encode(TALK)[0].ids
    with pytest.raises(Unusable, match="no supervised token"):
        encoder.encode([TALK[1], TALK[2] | {"train": False}])


def test_an_answer_that_stands_in_its_own_header_is_trained_to_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|lead|>"]})
    tokenizer.chat_template = HARMONY
    (found,) = ChatEncoder(tokenizer, 512).encode([TALK[1], {"role": "assistant", "content": "final"}])
    assert trained(tokenizer, found) == "<|lead|>final<|lead|>final<|im_end|>"


@pytest.mark.parametrize("colon", [":", ": "], ids=["apart", "merged over"])
def test_what_a_tokenizer_begins_a_text_with_begins_no_answer(tokenizer: PreTrainedTokenizerFast, colon: str) -> None:
    """SentencePiece puts a blank there: where the model goes on behind its prompt, there is none."""
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("_")
    lines = "{% for m in messages %}{{ m.role + COLON + m.content + '<|im_end|>' }}{% endfor %}"
    template = lines + "{% if add_generation_prompt %}{{ 'assistant' + COLON }}{% endif %}"
    tokenizer.chat_template = template.replace("COLON", repr(colon))
    (found,) = ChatEncoder(tokenizer, 512).encode([TALK[1], {"role": "assistant", "content": "the dog"}])
    assert trained(tokenizer, found) == "the dog<|im_end|>"
    asked = tokenizer.apply_chat_template([TALK[1]], add_generation_prompt=True, return_dict=False)
    assert found.ids[: len(asked)] == asked


@pytest.mark.parametrize(
    ("template", "talk", "reason"),
    [
        (CHAT_TEMPLATE, [{"role": "assistant", "content": "Hello."}], "an assistant opens it"),
        (CHAT_TEMPLATE, [{"role": "user", "content": "half \ud83d"}, TALK[2]], "half a character"),
        ("{% if messages[0]['content'] == 'odd' %}{{ 1 / 0 }}{% endif %}" + CHAT_TEMPLATE,
         [{"role": "user", "content": "odd"}, TALK[2]], "the chat template fails on it (ZeroDivisionError)"),
    ],
)  # fmt: skip
def test_what_a_row_breaks_is_the_rows_fault(
    tokenizer: PreTrainedTokenizerFast, template: str, talk: list[Message], reason: str
) -> None:
    """Anything else would end the run with a traceback that names no row."""
    tokenizer.chat_template = template
    with pytest.raises(Unusable) as problem:
        ChatEncoder(tokenizer, 512).encode(talk)
    assert reason in str(problem.value)


def test_a_tokenizer_that_fails_fails_on_its_row(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = ChatEncoder(tokenizer, 512)

    def fails(*_: object, **__: object) -> None:
        raise UnicodeError("no such letter")

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", fails)
    with pytest.raises(Unusable, match="the tokenizer fails on it"):
        encoder.encode(TALK)
