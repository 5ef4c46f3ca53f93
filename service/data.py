"""The first two stages: the base model's files, and every domain's tokenised examples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch

from ideal.benchmarks import tasks
from ideal.chat import ChatEncoder
from ideal.config import Config
from ideal.config_inputs import ModelConfig, Source
from ideal.domains import Domain, prepare
from ideal.model import load_tokenizer, local_folder, materialise, read_template
from ideal.pretraining import pretrain
from ideal.sources import files_of
from service.files import MODEL, reference_file, train_file
from service.progress import Reporter


def model_settings(config: ModelConfig) -> dict[str, Any]:
    """What the base model's files depend on; of local files their content, whatever their place."""
    settings: dict[str, Any] = {"source": config.source, "revision": config.revision}
    if config.made:
        corpus = [_source(f"model.made.corpus.{n}", source) for n, source in enumerate(config.made.corpus)]
        settings["made"] = {**config.made.model_dump(mode="json"), "corpus": corpus, "max_tokens": config.max_tokens}
    origin = local_folder(config)
    if origin:
        settings["source"] = {f.name: _digest(f) for f in sorted(origin.iterdir()) if f.is_file()}
    template = read_template(config)
    if template is not None:
        settings["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
    return settings


def base_model(folder: Path, config: ModelConfig, cpus: int, progress: Reporter) -> dict[str, Any]:
    """Put θ₀ into ``folder/model``; one that is made is trained by a worker of so many CPUs."""
    (folder / MODEL).mkdir(exist_ok=True)
    if config.made:
        ray.get(_pretrain.options(num_cpus=cpus).remote(config, folder / MODEL, cpus, progress))
    else:
        materialise(config, folder / MODEL)
    return {"bytes": sum(f.stat().st_size for f in (folder / MODEL).iterdir())}


@ray.remote
def _pretrain(config: ModelConfig, folder: Path, cpus: int, progress: Reporter) -> float:
    assert config.made
    torch.set_num_threads(cpus)
    return pretrain(config.made, folder, config.max_tokens, progress)


def data_settings(config: Config) -> dict[str, Any]:
    """What the examples depend on: sources with their files' content, and the benchmarks they must not overlap."""
    return {
        "max_tokens": config.model.max_tokens,
        "max_rejected": config.max_rejected,
        "domains": [
            {
                "name": d.name,
                "train": _source(f"domains.{d.name}.train", d.train),
                "reference": _source(f"domains.{d.name}.reference", d.reference),
            }
            for d in config.domains
        ],
        "benchmarks": benchmark_settings(config),
    }


def benchmark_settings(config: Config) -> list[dict[str, Any]]:
    """The benchmarks, with the content of their own task files in place of their folder."""
    return [
        {
            **b.model_dump(mode="json", exclude={"include"}),
            "include": [_digest(f) for f in sorted(Path(b.include).rglob("*")) if f.is_file()] if b.include else None,
        }
        for b in config.benchmarks
    ]


def data(folder: Path, *, model: Path, config: Config, progress: Reporter) -> dict[str, Any]:
    """Read, encode and check all domains into ``folder``.

    Returns:
        for each domain: pool, reference, tokens_per_example (supervised), and the account of its rows.
    """
    found = {}
    for domain in domains(config, model / MODEL, progress):
        domain.train.save(train_file(folder, domain.name))
        domain.reference.save(reference_file(folder, domain.name))
        found[domain.name] = {
            "pool": len(domain.train),
            "reference": len(domain.reference),
            "tokens_per_example": float(domain.train.supervised_tokens().mean()),
            "account": domain.account,
        }
    return found


def domains(
    config: Config,
    model: Path,
    progress: Callable[[str, int, int], None] = lambda message, done, total: None,
) -> list[Domain]:
    """All domains, without what their benchmarks ask.

    Args:
        model: a folder with the tokenizer.
    """
    encoder = ChatEncoder(load_tokenizer(model), config.model.max_tokens)
    held_out = tasks.questions(config.benchmarks, allow_code_execution=config.allow_code_execution)
    return prepare(config, encoder, held_out, progress)


def _source(where: str, source: Source) -> dict[str, Any]:
    """A source with its files' content in place of their names."""
    files = [_digest(path) for path in files_of(source, where)]
    return {**source.model_dump(mode="json", exclude={"files"}), "files": files}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
