"""The first stages: the base model's files, every domain's tokenised examples, and those of them that aren't held out.

    sources ─▶ examples (read and encoded) ─▶ data (without what reference sets and benchmarks ask) ─▶ SFT, influence, …

What follows depends on the *content* of the data, not on what it came from: a benchmark that is added and asks nothing
of the training examples changes none of them, so nothing is trained again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from safetensors.numpy import load_file, save_file

from ideal.config import Config
from ideal.config_inputs import BenchmarkConfig, ModelConfig, Source
from ideal.domains import accounts, encoded, held_out, prepare, removed, unasked
from ideal.examples import ExampleSet
from ideal.model_files import local_folder, read_template
from ideal.row_files import files_of
from service.files import MODEL, questions_file, reference_file, train_file
from service.progress import Reporter
from service.stages import WORK

if TYPE_CHECKING:
    from ideal.chat import ChatEncoder
    from ideal.domains import Domain

Checksum = Callable[[Path], str]
"""Of a file's content."""


def model_settings(config: ModelConfig, checksum: Checksum) -> dict[str, Any]:
    """What the base model's files depend on; of local files their content, whatever their place."""
    settings: dict[str, Any] = {"source": config.source, "revision": config.revision}
    if config.made:
        corpus = [_source(f"model.made.corpus.{n}", source, checksum) for n, source in enumerate(config.made.corpus)]
        settings["made"] = {**config.made.model_dump(mode="json"), "corpus": corpus, "max_tokens": config.max_tokens}
    origin = local_folder(config)
    if origin:
        settings["source"] = {f.name: checksum(f) for f in sorted(origin.iterdir()) if f.is_file()}
    template = read_template(config)
    if template is not None:
        settings["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
    return settings


def base_model(
    folder: Path, config: ModelConfig, cpus: int, checkpoint_steps: int, progress: Reporter
) -> dict[str, Any]:
    """Put θ₀ into ``folder/model``; one that is made is trained by a worker of so many CPUs.

    A making that was killed goes on from its last checkpoint in ``folder/work``.
    """
    from ideal.model import materialise

    (folder / MODEL).mkdir(exist_ok=True)
    if config.made:
        ray.get(_pretrain.options(num_cpus=cpus).remote(config, folder, cpus, checkpoint_steps, progress))
    else:
        materialise(config, folder / MODEL)
    return {"bytes": sum(f.stat().st_size for f in (folder / MODEL).iterdir())}


@ray.remote
def _pretrain(config: ModelConfig, folder: Path, cpus: int, checkpoint_steps: int, progress: Reporter) -> float:
    import torch

    from ideal.pretraining import pretrain

    assert config.made
    torch.set_num_threads(cpus)
    kept = folder / WORK / "kept"
    return pretrain(config.made, folder / MODEL, config.max_tokens, progress, kept, checkpoint_steps)


def example_settings(config: Config, checksum: Checksum) -> dict[str, Any]:
    """What the encoded examples depend on: sources with their files' content, and their greatest length."""
    return {
        "max_tokens": config.model.max_tokens,
        "domains": [
            {
                "name": d.name,
                "train": _source(f"domains.{d.name}.train", d.train, checksum),
                "reference": _source(f"domains.{d.name}.reference", d.reference, checksum),
            }
            for d in config.domains
        ],
    }


def examples(folder: Path, *, model: Path, config: Config, progress: Reporter) -> dict[str, Any]:
    """Read and encode all domains into ``folder``.

    Returns:
        for each domain the account of its rows, of `train` and `reference`.
    """
    found = {}
    for name, (train, reference) in encoded(config, _encoder(config, model / MODEL), progress):
        train.examples.save(train_file(folder, name))
        reference.examples.save(reference_file(folder, name))
        save_file({"train": train.questions, "reference": reference.questions}, questions_file(folder, name))
        found[name] = accounts(train, reference)
    return found


def question_settings(config: Config, checksum: Checksum) -> list[dict[str, Any]]:
    """What the benchmarks' questions depend on: not how they are asked, how many of them, or how they are scored."""
    generated = {"reasoning_gym", "options", "size", "seed", "num_fewshot"}
    return [
        {
            **b.model_dump(mode="json", include=generated if b.reasoning_gym else {"task"}),
            "include": _included(b, checksum),
        }
        for b in config.benchmarks
    ]


def data(
    folder: Path, *, examples: Path, found: Mapping[str, Any], config: Config, progress: Reporter
) -> dict[str, Any]:
    """Put the examples that aren't held out into ``folder``.

    Args:
        examples: the examples stage's folder.
        found: its result.

    Returns:
        for each domain: pool, reference, tokens_per_example (supervised), content (a checksum of both sets), and the
        account of its rows.
    """
    from ideal.benchmarks import tasks

    progress("what benchmarks ask", 0, len(found))
    texts = tasks.questions(config.benchmarks, allow_code_execution=config.allow_code_execution)
    asked = {name: load_file(questions_file(examples, name)) for name in found}
    held = held_out(texts, [each["reference"] for each in asked.values()])
    made = {}
    for number, (name, account) in enumerate(found.items()):
        progress(name, number, len(found))
        kept = unasked(name, asked[name]["train"], held)
        train, reference = (ExampleSet.load(place(examples, name)) for place in (train_file, reference_file))
        _same(reference_file(examples, name), reference_file(folder, name))
        if kept.all():
            _same(train_file(examples, name), train_file(folder, name))
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


def content(found: Mapping[str, Any]) -> str:
    """What names the data by its content: every domain's examples, in their order.

    Args:
        found: the data stage's result.
    """
    sets = [[name, each["content"]] for name, each in found.items()]
    return hashlib.sha256(json.dumps(sets).encode()).hexdigest()[:20]


def benchmark_settings(benchmark: BenchmarkConfig, checksum: Checksum) -> dict[str, Any]:
    """What a benchmark's score depends on, with the content of its own task files in place of their folder."""
    return {
        **benchmark.model_dump(mode="json", exclude={"name", "include"}),
        "include": _included(benchmark, checksum),
    }


def domains(config: Config, model: Path) -> list[Domain]:
    """All domains, without what their benchmarks ask.

    Args:
        model: a folder with the tokenizer.
    """
    from ideal.benchmarks import tasks

    held = tasks.questions(config.benchmarks, allow_code_execution=config.allow_code_execution)
    return prepare(config, _encoder(config, model), held)


def _encoder(config: Config, model: Path) -> ChatEncoder:
    from ideal.chat import ChatEncoder
    from ideal.model import load_tokenizer

    return ChatEncoder(load_tokenizer(model), config.model.max_tokens)


def _source(where: str, source: Source, checksum: Checksum) -> dict[str, Any]:
    """A source with its files' content in place of their names."""
    files = [checksum(path) for path in files_of(source, where)]
    return {**source.model_dump(mode="json", exclude={"files"}), "files": files}


def _included(benchmark: BenchmarkConfig, checksum: Checksum) -> list[str] | None:
    if not benchmark.include:
        return None
    return [checksum(file) for file in sorted(Path(benchmark.include).rglob("*")) if file.is_file()]


def _same(source: Path, target: Path) -> None:
    """A file of another stage, without a second copy where the file system has links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
