"""Low-rank adapters (LoRA, Hu et al. 2021): a layer computes (W + α/r · B A) x, of which A and B are trained.

A model with adapters is one in memory whose linear layers were exchanged, and a folder with A and B alone, in peft's
format, that names the folder of its base: transformers, vLLM and peft load it as they would a whole model. Influence
sees the layers that are trained, so the tracked linear layers are A and B, of each layer that a pattern names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ideal.errors import BadInput
from ideal.model.files import ADAPTER_SETTINGS, is_adapter

if TYPE_CHECKING:
    from ideal.config.config import LoraConfig

A, B = ".lora_A.default", ".lora_B.default"
"""What peft calls an adapter's two linear layers, behind the name of the layer that they are added to."""


def add(model: nn.Module, settings: LoraConfig) -> None:
    """Give the model's linear layers adapters, which change nothing yet (B = 0); only these can be trained then.

    A is drawn from PyTorch's generator.

    Raises:
        BadInput: a target is no linear layer of the model.
    """
    import peft

    linears = linear_layers(model)
    for target in settings.targets or []:
        if not any(f".{name}".endswith(f".{target}") for name in linears):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise BadInput("sft.lora.targets", f"{target!r} is no linear layer", f"the model has {known}")
    model.add_adapter(  # type: ignore[operator]
        peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=settings.targets or "all-linear",
            task_type="CAUSAL_LM",
        )
    )


def linear_layers(model: nn.Module) -> list[str]:
    """Names of all linear layers but the head, in the model's order."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def base_of(folder: Path) -> Path:
    """The folder with a model's configuration and whole weights: of adapters their base's, else the same one.

    Where storage was moved, the base is the stage of that name in the storage that the adapters are in now.
    """
    if not is_adapter(folder):
        return folder
    named = Path(json.loads((folder / ADAPTER_SETTINGS).read_text())["base_model_name_or_path"])
    moved = folder.absolute().parents[2].joinpath(*named.parts[-3:])  # stages / kind / fingerprint / model
    return named if named.is_dir() or not moved.is_dir() else moved


def sizes_of(folder: Path) -> tuple[int, list[str]]:
    """The rank of a folder's adapters, and the last parts of the names of the layers that have one."""
    found = json.loads((folder / ADAPTER_SETTINGS).read_text())
    return int(found["r"]), sorted({name.rpartition(".")[2] for name in found["target_modules"]})


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """W + α/r · B A and all other parameters, by the names that they have in the base; adapters are merged for good."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    return {
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in model.named_parameters()
        if A not in name and B not in name
    }
