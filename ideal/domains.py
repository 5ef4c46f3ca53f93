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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ideal.chat import ChatEncoder, Example, Message, Unusable
from ideal.config import Config
from ideal.config_inputs import Source
from ideal.errors import BadInput
from ideal.examples import ExampleSet
from ideal.sources import messages, rows

SHOWN = 20
"""Rejected rows that are reported one by one, for each source."""


@dataclass
class Account:
    """What became of a source's rows."""

    rows: int = 0
    used: int = 0
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
            "rejected": dict(self.rejected),
            "rejected_rows": self.examples,
            "overlapping": self.overlapping,
        }


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


def prepare(
    config: Config,
    encoder: ChatEncoder,
    benchmark_texts: Iterable[str],
    progress: Callable[[str, int, int], None] = lambda message, done, total: None,
) -> list[Domain]:
    """Read, encode and check every domain.

    Args:
        benchmark_texts: questions of all benchmark items; equal training examples are removed.
        progress: told (domain, domains done, domains in all).

    Raises:
        BadInput: a source can't be read, or has too many unusable rows.
    """
    references: dict[str, list[Example]] = {}
    accounts: dict[str, Account] = {}
    for domain in config.domains:
        where = f"domains.{domain.name}.reference"
        accounts[where] = Account()
        read = _encode(domain.reference, where, encoder, accounts[where], config.max_rejected)
        references[domain.name] = [example for example, _ in read]
    held_out = {_key(text) for text in benchmark_texts}
    held_out |= {_key(example.prompt) for examples in references.values() for example in examples}
    held_out.discard(_key(""))

    domains = []
    for number, domain in enumerate(config.domains):
        progress(domain.name, number, len(config.domains))
        where = f"domains.{domain.name}.train"
        account = accounts[where] = Account()
        read = _encode(domain.train, where, encoder, account, config.max_rejected)
        pool = [(example, chat) for example, chat in read if _key(example.prompt) not in held_out]
        account.overlapping, account.used = len(read) - len(pool), len(pool)
        if not pool:
            raise BadInput(where, "holds nothing that isn't in a reference set or benchmark too", "give other rows")
        domains.append(
            Domain(
                domain.name,
                ExampleSet.of([example for example, _ in pool]),
                ExampleSet.of(references[domain.name]),
                [chat for _, chat in pool],
                {
                    "train": account.as_dict(),
                    "reference": accounts[f"domains.{domain.name}.reference"].as_dict(),
                },
            )
        )
    return domains


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


def _encode(
    source: Source, where: str, encoder: ChatEncoder, account: Account, max_rejected: float
) -> list[tuple[Example, list[Message]]]:
    examples = []
    for place, row in rows(source, where):
        account.rows += 1
        try:
            chat = messages(row, source, where)
            examples.append((encoder.encode(chat), chat))
        except Unusable as reason:
            account.reject(place, str(reason))
    account.used = len(examples)
    bad = account.rows - account.used
    if not account.rows:
        raise BadInput(where, "has no rows", "check the source")
    if bad > max_rejected * account.rows:
        listed = "\n    ".join(account.examples[:5])
        raise BadInput(
            where,
            f"{bad} of {account.rows} rows can't be used, more than max_rejected ({max_rejected:.0%}); "
            f"first:\n    {listed}",
            "mend the rows, map their columns with `fields`, or raise max_rejected",
        )
    return examples


def _key(text: str) -> bytes:
    """A question's fingerprint: its words in lower case."""
    return hashlib.blake2b(" ".join(re.findall(r"\w+|[^\w\s]", text.lower())).encode(), digest_size=16).digest()
