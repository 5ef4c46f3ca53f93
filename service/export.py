"""``ideal export``: a run's mixture in the forms that other trainers read.

| file | for |
| --- | --- |
| `train.jsonl`, `train.parquet`, `dataset/` | the mixture in the order of SFT's first epoch |
| `domains/*.jsonl`, `mixture.json` | each domain's whole pool, and the probabilities to sample them with |
| `llama-factory.yaml` (and `dataset_info.json`), `axolotl.yaml`, `trl.yaml` | those trainers, set as the run's SFT |

Examples are chats, `{"messages": […], "domain": …}`, without what was left out as unusable or held out. An answer
that SFT wasn't trained on has `"train": false`, which the trainers' files don't heed. Examples are read again from
their sources, which must still be what the run read.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.markup import escape

from ideal.benchmarks import tasks
from ideal.config.config import Config, LoraConfig
from ideal.data.chat import ChatEncoder
from ideal.data.domains import Domain, prepare
from ideal.errors import BadInput
from ideal.mixture import data_order, draw
from ideal.model.base import load_tokenizer
from service.cluster.precision import decided
from service.outcome import Outcome
from service.reports import report
from service.runs.run import replay
from service.store.layout import MODEL
from service.store.names import run_name
from service.store.store import RECORD

DECAY = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""Our names of schedules in transformers' words."""


def export(config: Config, to: Path, console: Console) -> None:
    """Write the mixture that a run has come to; the run may go on. The folder appears whole, or not at all.

    Args:
        to: a folder that isn't there yet, or is empty.

    Raises:
        BadInput: nothing is recorded, the sources aren't what they were, or the folder holds something.
    """
    config = decided(config, lambda line: console.print(escape(line)))
    outcome = replay(config, lambda line: console.print(escape(line)))
    if not outcome.iterations:
        raise BadInput("export", "nothing of this run is recorded yet", "run it first")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise BadInput("--to", f"{to} isn't an empty folder", "name another")
    if not outcome.stopped:
        console.print(f"[yellow]![/] the run isn't at its end: this is {report.label(outcome.equilibrium)}")
    final = outcome.equilibrium
    if not any(final.volumes.values()):
        raise BadInput("export", "`base` trains on nothing: there is no mixture", "set another method")
    read = domains(config, final.sft.folder / MODEL)
    for domain in read:
        if len(domain.chats) != outcome.data.result[domain.name]["pool"]:
            raise BadInput(
                f"domains.{domain.name}.train",
                f"has {len(domain.chats)} usable rows now, {outcome.data.result[domain.name]['pool']} in the run",
                "put the files back as they were",
            )
    mixture = mixed(read, final.volumes, config.seed)
    new = to.absolute().with_name(f".{to.absolute().name}-unfinished")
    shutil.rmtree(new, ignore_errors=True)
    (new / "domains").mkdir(parents=True)
    for domain in read:
        _lines(new / "domains" / f"{domain.name}.jsonl", rows_of(domain))
    _lines(new / "train.jsonl", mixture)
    disable_progress_bars()
    dataset = Dataset.from_list(mixture)
    dataset.to_parquet(new / "train.parquet")
    dataset.save_to_disk(new / "dataset")
    (new / "mixture.json").write_text(json.dumps(_mixture(config, outcome), indent=1) + "\n")
    for name, tree in trainers(config, base_of(config, outcome), len(mixture)).items():
        (new / name).write_text(json.dumps(tree, indent=1) if name.endswith("json") else yaml.safe_dump(tree))
    new.rename(to)
    console.print(f"{report.label(final)}: {len(mixture)} examples of {len(read)} domains in {to}", soft_wrap=True)


def domains(config: Config, model: Path) -> list[Domain]:
    """All domains, without what their benchmarks ask.

    Args:
        model: a folder with the tokenizer.
    """
    held = tasks.questions(config.benchmarks, allow_code_execution=config.allow_code_execution)
    return prepare(config, ChatEncoder(load_tokenizer(model), config.model.max_tokens), held)


def rows_of(domain: Domain) -> list[dict[str, Any]]:
    """A domain's pool."""
    return [{"messages": chat, "domain": domain.name} for chat in domain.chats]


def mixed(read: Iterable[Domain], volumes: dict[str, int], seed: int) -> list[dict[str, Any]]:
    """The mixture's examples in the order of SFT's first epoch."""
    pools = {domain.name: rows_of(domain) for domain in read}
    drawn = [pools[name][i] for name, volume in volumes.items() for i in draw(len(pools[name]), volume, seed, name)]
    return [drawn[position] for position in data_order(volumes, 1.0, seed)]


def base_of(config: Config, outcome: Outcome) -> str:
    """The base model as other trainers can load it: a folder or a hub id."""
    if config.model.source not in ("smollm2", "made"):
        return config.model.source
    model = json.loads((outcome.equilibrium.sft.folder / RECORD).read_text())["fields"]["base"]
    return str(config.root / "stages" / "model" / model / MODEL)


def trainers(config: Config, model: str, examples: int) -> dict[str, Any]:
    """Each trainer's file, to be used from the export's folder, for so many examples."""
    sft = config.sft
    steps = math.ceil(examples * sft.epochs / sft.batch_examples)
    shared = {
        "learning_rate": sft.learning_rate,
        "weight_decay": sft.weight_decay,
        "adam_beta1": sft.beta1,
        "adam_beta2": sft.beta2,
        "max_grad_norm": sft.clip_norm,
        "seed": config.seed,
        "bf16": sft.precision == "bf16",
        "gradient_accumulation_steps": sft.batch_examples,
        "warmup_steps": round(sft.warmup * steps),  # a share goes by another name in every version of transformers
    }
    own = {"model_name_or_path": model, "per_device_train_batch_size": 1, "num_train_epochs": sft.epochs}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
    tags |= {"assistant_tag": "assistant", "system_tag": "system"}
    adapters = _adapters(sft.lora)
    form = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    return {
        "dataset_info.json": {"ideal": {"file_name": "train.jsonl", **form}},
        "llama-factory.yaml": {
            **shared,
            **own,
            "lr_scheduler_type": DECAY[sft.decay],
            "stage": "sft",
            "do_train": True,
            **adapters["llama-factory"],
            "dataset_dir": ".",
            "dataset": "ideal",
            "cutoff_len": config.model.max_tokens,
            "output_dir": "llama-factory",
        },
        "axolotl.yaml": {
            **shared,
            "base_model": model,
            "datasets": [
                {"path": "train.jsonl", "ds_type": "json", "type": "chat_template", "field_messages": "messages"}
            ],
            **adapters["axolotl"],
            "sequence_len": config.model.max_tokens,
            "micro_batch_size": 1,
            "num_epochs": sft.epochs,
            "optimizer": "adamw_torch",
            "lr_scheduler": DECAY[sft.decay],
            "output_dir": "axolotl",
        },
        "trl.yaml": {
            **shared,
            **own,
            "lr_scheduler_type": DECAY[sft.decay],
            "datasets": [{"path": "json", "data_files": "train.jsonl", "split": "train"}],
            "max_length": config.model.max_tokens,
            "assistant_only_loss": True,
            **adapters["trl"],
            "output_dir": "trl",
        },
    }


def _adapters(lora: LoraConfig | None) -> dict[str, dict[str, Any]]:
    """What each trainer is told of adapters."""
    if lora is None:
        return {"llama-factory": {"finetuning_type": "full"}, "axolotl": {}, "trl": {}}
    sizes = {"lora_alpha": lora.alpha, "lora_dropout": 0.0}
    targets = {"lora_target_modules": lora.targets} if lora.targets else {"lora_target_linear": True}
    factory = {"finetuning_type": "lora", "lora_rank": lora.rank, "lora_target": ",".join(lora.targets or ["all"])}
    return {
        "llama-factory": {**factory, **sizes},
        "axolotl": {"adapter": "lora", "lora_r": lora.rank, **targets, **sizes},
        "trl": {"use_peft": True, "lora_r": lora.rank, "lora_target_modules": lora.targets or ["all-linear"], **sizes},
    }


def _mixture(config: Config, outcome: Outcome) -> dict[str, Any]:
    volumes = outcome.equilibrium.volumes
    total = sum(volumes.values())
    return {
        "run": run_name(config),
        "at": report.label(outcome.equilibrium),
        "seed": config.seed,
        "volumes": volumes,
        "pools": {name: found["pool"] for name, found in outcome.data.result.items()},
        "probabilities": {name: volume / total for name, volume in volumes.items()},
    }


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
