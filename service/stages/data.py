"""The examples that aren't held out: without what reference sets and benchmarks ask.

What follows depends on the *content* of the data, not on what it came from: a benchmark that is added and asks nothing
of the training examples changes none of them, so nothing is trained again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from safetensors.numpy import load_file

from ideal.config.inputs import BenchmarkConfig
from ideal.data.domains import held_out, removed, unasked
from ideal.data.examples import ExampleSet
from service.stages.content import Checksum, included_content
from service.stages.examples import Account
from service.stages.workers import Workers
from service.store.layout import questions_file, reference_file, train_file
from service.store.stage import Identified, Record, Stage


class DomainData(TypedDict):
    """What a domain has to draw from.

    Attributes:
        pool: training examples.
        reference: reference examples.
        tokens_per_example: supervised ones, the pool's mean.
        content: a checksum of both sets.
        account: of the domain's rows.
    """

    pool: int
    reference: int
    tokens_per_example: float
    content: str
    account: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Data(Stage[dict[str, DomainData]]):
    """Every domain's examples without those whose question is a reference set's or a benchmark's."""

    kind = "data"
    version = 3
    benchmarks: Identified[list[BenchmarkConfig]]
    examples: Record[dict[str, Account]]

    def run(self, folder: Path, on: Workers) -> dict[str, DomainData]:
        from ideal.benchmarks import tasks

        read, found = self.examples.folder, self.examples.result
        on.progress("what benchmarks ask", 0, len(found))
        texts = tasks.questions(self.benchmarks.value, allow_code_execution=on.allow_code_execution)
        asked = {name: load_file(questions_file(read, name)) for name in found}
        held = held_out(texts, [each["reference"] for each in asked.values()])
        made: dict[str, DomainData] = {}
        for number, (name, account) in enumerate(found.items()):
            on.progress(name, number, len(found))
            kept = unasked(name, asked[name]["train"], held)
            train, reference = (ExampleSet.load(place(read, name)) for place in (train_file, reference_file))
            _same(reference_file(read, name), reference_file(folder, name))
            if kept.all():
                _same(train_file(read, name), train_file(folder, name))
            else:
                train = train.where(kept)
                train.save(train_file(folder, name))
            made[name] = {
                "pool": len(train),
                "reference": len(reference),
                "tokens_per_example": float(train.supervised_tokens().mean()),
                "content": hashlib.sha256(f"{train.digest()} {reference.digest()}".encode()).hexdigest(),
                "account": {**account, "train": {**account["train"], **removed(kept)}},
            }
        return made


def identified(benchmarks: Sequence[BenchmarkConfig], checksum: Checksum) -> Identified[list[BenchmarkConfig]]:
    """Benchmarks by their questions: not by how they are asked, how many of them, or how they are scored."""
    generated = {"reasoning_gym", "options", "size", "seed", "num_fewshot"}
    return Identified(
        list(benchmarks),
        [
            {
                **b.model_dump(mode="json", include=generated if b.reasoning_gym else {"task"}),
                "include": included_content(b, checksum),
            }
            for b in benchmarks
        ],
    )


def content(found: Mapping[str, DomainData]) -> str:
    """What names the data by its content: every domain's examples, in their order.

    Args:
        found: the data stage's result.
    """
    sets = [[name, each["content"]] for name, each in found.items()]
    return hashlib.sha256(json.dumps(sets).encode()).hexdigest()[:20]


def _same(source: Path, target: Path) -> None:
    """A file of another stage, without a second copy where the file system has links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
