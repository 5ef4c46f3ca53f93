"""Every domain's rows, read and tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from safetensors.numpy import save_file

from ideal.config.inputs import DomainConfig
from ideal.data.domains import accounts, encoded
from service.stages.content import Checksum, source_content
from service.stages.workers import Workers
from service.store.layout import MODEL, questions_file, reference_file, train_file
from service.store.stage import Identified, Record, Stage


class Account(TypedDict):
    """What became of a domain's rows; ``ideal.data.domains.Account`` says what is in each."""

    train: dict[str, Any]
    reference: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Examples(Stage[dict[str, Account]]):
    """Every domain's training and reference examples, and what they ask, as fingerprints."""

    kind = "examples"
    version = 2
    domains: Identified[list[DomainConfig]]
    max_tokens: int
    base: Record[Any]

    def run(self, folder: Path, on: Workers) -> dict[str, Account]:
        from ideal.data.chat import ChatEncoder
        from ideal.model.base import load_tokenizer

        encoder = ChatEncoder(load_tokenizer(self.base.folder / MODEL), self.max_tokens)
        found: dict[str, Account] = {}
        for name, (train, reference) in encoded(self.domains.value, encoder, on.progress):
            train.examples.save(train_file(folder, name))
            reference.examples.save(reference_file(folder, name))
            save_file({"train": train.questions, "reference": reference.questions}, questions_file(folder, name))
            account = accounts(train, reference)
            found[name] = {"train": account["train"], "reference": account["reference"]}
        return found


def identified(domains: list[DomainConfig], checksum: Checksum) -> Identified[list[DomainConfig]]:
    """Domains by their sources' content; their volumes are no matter of what there is to draw from."""
    return Identified(
        domains,
        [
            {
                "name": d.name,
                "train": source_content(f"domains.{d.name}.train", d.train, checksum),
                "reference": source_content(f"domains.{d.name}.reference", d.reference, checksum),
            }
            for d in domains
        ],
    )
