"""Tracked linear layers: what goes in (a), what gradient comes back to their output (g).

No weight needs a gradient for that: a tracked layer's output is made the start of the graph where nothing before it
is, so the backward pass ends at the lowest tracked layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ideal.config.config import LoraConfig
from ideal.errors import BadInput
from ideal.model import lora

SHARED_INPUT = (("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj"))
"""Layers of one module that read the same input, and so have the same A."""


def tracked_layers(model: nn.Module, patterns: list[str]) -> list[str]:
    """Names of the linear layers that match a pattern, in the model's order; never the head, and of a model with
    adapters only these.

    Raises:
        BadInput: none matches.
    """
    linears = lora.linear_layers(model)
    linears = [n for n in linears if n.endswith((lora.A, lora.B))] or linears
    found = [n for n in linears if any(fnmatchcase(n, pattern) for pattern in patterns)]
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in linears):
            raise BadInput(
                "influence.layers",
                f"{pattern!r} matches no linear layer",
                f"the model has e.g. {', '.join(linears[:7])}",
            )
    return found


def input_group(layer: str) -> str:
    """The name of the layer's input: equal for layers that share it, as the A of adapters on such layers do."""
    if layer.endswith(lora.A):
        return input_group(layer.removesuffix(lora.A)) + lora.A
    parent, _, leaf = layer.rpartition(".")
    group = next((g for g in SHARED_INPUT if leaf in g), (leaf,))
    return f"{parent}.{'+'.join(group)}"


class Recorder:
    """What passed through the tracked layers in the last forward pass.

    Attributes:
        inputs: [n, L, d_in] by input group.
        outputs: [n, L, d_out] by layer, part of the graph.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}


@contextmanager
def record(model: nn.Module, layers: list[str]) -> Iterator[Recorder]:
    """Record the tracked layers for as long as the context lasts; all weights are frozen for good."""
    model.requires_grad_(False)
    recorder = Recorder()

    def hook_for(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            recorder.inputs[input_group(name)] = args[0].detach()
            if not output.requires_grad:
                output.requires_grad_(True)
            recorder.outputs[name] = output

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(hook_for(name)) for name in layers]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def layer_shapes(
    config: PretrainedConfig, patterns: list[str], adapters: LoraConfig | None = None
) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the tracked layers in the model's order, from its configuration alone, without weights.

    Args:
        adapters: that the model has.

    Raises:
        BadInput: a pattern matches no layer.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        if adapters:
            lora.add(model, adapters)
    modules = dict(model.named_modules())
    return {name: tuple(modules[name].weight.shape) for name in tracked_layers(model, patterns)}
