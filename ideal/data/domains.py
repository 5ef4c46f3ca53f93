"""Domains: from rows to training and reference examples, with an account of everything that was left out.

A row that is empty, malformed, too long or has nothing to learn is counted with its file and line; more than
``max_rejected`` of them stops the run. A training example whose question also stands in a reference set or a
benchmark is removed: otherwise the method would be steering towards what it has already seen. Questions are compared
as words in lower case, so a paraphrase is not found.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ideal.config.config import Config
from ideal.config.inputs import DomainConfig, Source
from ideal.data.chat import ChatEncoder, Example, Message, Unusable
from ideal.data.examples import ExampleSet
from ideal.data.sources import messages, rows
from ideal.errors import BadInput

SHOWN = 20
"""Rejected rows that are reported one by one, for each source."""

KEY = 16
"""Bytes of a question's fingerprint."""


@dataclass
class Account:
    """What became of a source's rows.

    Attributes:
        used: examples made of them.
        divided: rows that gave several, since the chat template rewrites earlier turns.
    """

    rows: int = 0
    used: int = 0
    divided: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    overlapping: int = 0

    def reject(self, where: str, reason: str) -> None:
        self.rejected[reason] += 1
        if len(self.examples) < SHOWN:
            self.examples.append(f"{where}: {reason}")

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "used": self.used,
            "divided": self.divided,
            "rejected": dict(self.rejected),
            "rejected_rows": self.examples,
            "overlapping": self.overlapping,
        }


@dataclass
class Encoded:
    """A source's usable rows.

    Attributes:
        questions: [n, 16] bytes; what each example asks, as a fingerprint that held-out questions are found by.
        chats: the examples as messages.
        account: rows, used, rejected by reason, overlapping.
    """

    examples: ExampleSet
    questions: npt.NDArray[np.uint8]
    chats: list[list[Message]]
    account: dict[str, Any]


@dataclass
class Domain:
    """A capability, ready to be mixed: its pool of training examples and its reference set.

    Attributes:
        chats: the pool's examples as messages, in its order.
        account: of both sources: rows, used, rejected by reason, overlapping.
    """

    name: str
    train: ExampleSet
    reference: ExampleSet
    chats: list[list[Message]]
    account: dict[str, Any]


def prepare(config: Config, encoder: ChatEncoder, benchmark_texts: Iterable[str]) -> list[Domain]:
    """Read, encode and check every domain.

    Args:
        benchmark_texts: questions of all benchmark items; equal training examples are removed.

    Raises:
        BadInput: a source can't be read, or has too many unusable rows, or a domain has no example left.
    """
    read = dict(encoded(config.domains, encoder))
    check_rejected({name: accounts(*parts) for name, parts in read.items()}, config.max_rejected)
    held = held_out(benchmark_texts, [reference.questions for _, reference in read.values()])
    domains = []
    for name, (train, reference) in read.items():
        kept = unasked(name, train.questions, held)
        chats = [chat for chat, keep in zip(train.chats, kept, strict=True) if keep]
        account = accounts(train, reference)
        account["train"] |= removed(kept)
        domains.append(Domain(name, train.examples.where(kept), reference.examples, chats, account))
    return domains


def encoded(
    domains: Sequence[DomainConfig],
    encoder: ChatEncoder,
    progress: Callable[[str, int, int], None] = lambda message, done, total: None,
) -> Iterator[tuple[str, tuple[Encoded, Encoded]]]:
    """Read and encode every domain; yields its name, its training rows and its reference set.

    Args:
        progress: told (domain, domains done, domains in all).

    Raises:
        BadInput: a source can't be read, or has no rows.
    """
    for number, domain in enumerate(domains):
        progress(domain.name, number, len(domains))
        reference = _encode(domain.reference, f"domains.{domain.name}.reference", encoder)
        yield domain.name, (_encode(domain.train, f"domains.{domain.name}.train", encoder), reference)


def accounts(train: Encoded, reference: Encoded) -> dict[str, Any]:
    """What became of both sources' rows."""
    return {"train": dict(train.account), "reference": dict(reference.account)}


def check_rejected(found: Mapping[str, Mapping[str, Any]], most: float) -> None:
    """Check that no source has too many unusable rows.

    Args:
        found: by domain, the accounts of its `train` and its `reference`.
        most: the largest share of a source's rows.

    Raises:
        BadInput: one has; with the first of them.
    """
    for name, parts in found.items():
        for part in ("reference", "train"):
            rows_, rejected = parts[part]["rows"], sum(parts[part]["rejected"].values())
            if rejected > most * rows_:
                listed = "\n    ".join(parts[part]["rejected_rows"][:5])
                raise BadInput(
                    f"domains.{name}.{part}",
                    f"{rejected} of {rows_} rows can't be used, more than max_rejected ({most:.0%}); "
                    f"first:\n    {listed}",
                    "mend the rows, map their columns with `fields`, or raise max_rejected",
                )


def held_out(benchmark_texts: Iterable[str], references: Iterable[npt.NDArray[np.uint8]]) -> set[bytes]:
    """Fingerprints of all questions that no training example may ask.

    Args:
        references: [n, 16] those of each reference set.
    """
    found = {_key(text) for text in benchmark_texts}
    found.update(bytes(row) for questions in references for row in questions)
    found.discard(_key(""))
    return found


def unasked(name: str, questions: npt.NDArray[np.uint8], held: set[bytes]) -> npt.NDArray[np.bool_]:
    """[n] whether each of a domain's training examples stays.

    Args:
        questions: [n, 16] their fingerprints.

    Raises:
        BadInput: none does.
    """
    kept = np.array([bytes(row) not in held for row in questions], bool)
    if not kept.any():
        raise BadInput(
            f"domains.{name}.train", "holds nothing that isn't in a reference set or benchmark too", "give other rows"
        )
    return kept


def removed(kept: npt.NDArray[np.bool_]) -> dict[str, int]:
    """The part of a training source's account that says what was held out."""
    return {"used": int(kept.sum()), "overlapping": int((~kept).sum())}


def starting_volumes(config: Config, found: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """D0: examples of each domain.

    Args:
        found: for each domain `pool` and `reference`, its numbers of examples, and `account`.

    Raises:
        BadInput: a domain has fewer examples than its volume, or too few for the influence's blocks.
    """
    volumes = {}
    for domain in config.domains:
        pool, train = found[domain.name]["pool"], found[domain.name]["account"]["train"]
        volumes[domain.name] = domain.volume or pool
        if volumes[domain.name] > pool:
            raise BadInput(
                f"domains.{domain.name}.volume",
                f"asks for {domain.volume} examples, but its source gives {pool} ({train['rows']} rows, "
                f"{sum(train['rejected'].values())} unusable, {train['overlapping']} also held out)",
                "lower the volume or give more rows",
            )
        for part, count in (("train", pool), ("reference", found[domain.name]["reference"])):
            if count < config.influence.blocks:
                raise BadInput(
                    f"domains.{domain.name}.{part}",
                    f"has {count} examples, fewer than influence.blocks ({config.influence.blocks})",
                    "give more rows or lower influence.blocks",
                )
    return volumes


def _encode(source: Source, where: str, encoder: ChatEncoder) -> Encoded:
    account, examples, chats = Account(), list[Example](), list[list[Message]]()
    for place, row in rows(source, where):
        account.rows += 1
        try:
            made = encoder.encode(messages(row, source))
        except Unusable as reason:
            account.reject(place, str(reason))
            continue
        account.divided += len(made) > 1
        examples += made
        chats += [example.messages for example in made]
    account.used = len(examples)
    if not account.rows:
        raise BadInput(where, "has no rows", "check the source")
    questions = np.frombuffer(b"".join(_key(example.prompt) for example in examples), np.uint8).reshape(-1, KEY)
    return Encoded(ExampleSet.of(examples), questions, chats, account.as_dict())


def _key(text: str) -> bytes:
    """A question's fingerprint: its words in lower case."""
    return hashlib.blake2b(" ".join(re.findall(r"\w+|[^\w\s]", text.lower())).encode(), digest_size=KEY).digest()
