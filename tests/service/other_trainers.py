"""Reads an export as another trainer does, in that trainer's own environment: ``python other_trainers.py TOOL``.

Runs in the export's folder; its last line is JSON: rows ([ids, labels] each, −100 where nothing is learned) and what
the trainer makes of some settings.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from collections.abc import Callable
from typing import Any

import yaml


def llama_factory() -> dict[str, Any]:
    """What ``llamafactory-cli train llama-factory.yaml`` would train on."""
    absent = types.ModuleType("torchaudio")  # imported for sounds; PyPI has it for CUDA only
    absent.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = absent
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from transformers import AutoTokenizer

    with open("llama-factory.yaml") as file:
        settings = {**yaml.safe_load(file), "use_cpu": True, "report_to": "none"}
    model, data, training, adapters, _ = get_train_args(settings)
    read = {"tokenizer": AutoTokenizer.from_pretrained(model.model_name_or_path), "processor": None}
    template = get_template_and_fix_tokenizer(read["tokenizer"], data)
    found = get_dataset(template, model, data, training, stage="sft", **read)["train_dataset"]
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    sizes = [adapters.lora_rank, adapters.lora_alpha, adapters.lora_dropout]
    targets = "all linear" if adapters.finetuning_type == "lora" and adapters.lora_target == ["all"] else None
    return {
        "rows": rows(found),
        "learning_rate": training.learning_rate,
        "batch": batch,
        "adapters": [*sizes, targets],
    }


def axolotl() -> dict[str, Any]:
    """What ``axolotl train axolotl.yaml`` would train on."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets

    settings = load_cfg("axolotl.yaml", dataset_num_proc=1)
    found = load_datasets(cfg=settings).train_dataset
    batch = settings.micro_batch_size * settings.gradient_accumulation_steps
    sizes = [settings.lora_r, settings.lora_alpha, settings.lora_dropout]
    targets = "all linear" if settings.adapter == "lora" and settings.lora_target_linear else None
    return {
        "rows": rows(found),
        "learning_rate": settings.learning_rate,
        "batch": batch,
        "adapters": [*sizes, targets],
    }


def rows(dataset: Any) -> list[Any]:
    return [[row["input_ids"], row["labels"]] for row in dataset]


TOOLS: dict[str, Callable[[], dict[str, Any]]] = {"llama-factory": llama_factory, "axolotl": axolotl}
if __name__ == "__main__":
    read = TOOLS[sys.argv[1]]()
    print()
    print(json.dumps(read))
