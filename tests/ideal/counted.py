"""Token passes that models really make: every decoder's forward with its tangents, and every way back through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlamaModel

from ideal.influence import joint


class Counted:
    """How many so far."""

    passes = 0


@contextmanager
def counted() -> Iterator[Counted]:
    """Count all that happens within."""
    found, real, tangents = Counted(), joint.vmap, [0]

    def vmap(along: Any) -> Any:
        def mapped(directions: dict[str, torch.Tensor]) -> Any:
            tangents[0] = len(next(iter(directions.values())))
            try:
                return real(along)(directions)
            finally:
                tangents[0] = 0

        return mapped

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not isinstance(module, LlamaModel) or kwargs.get("attention_mask") is None:
            return  # three tokens that try a model's head as it is loaded have none
        tokens, hidden = int(kwargs["attention_mask"].sum()), output.last_hidden_state
        alone = not tangents[0] and forward_ad._current_level >= 0
        found.passes += tokens * (1 + tangents[0] + (alone and forward_ad.unpack_dual(hidden).tangent is not None))
        if hidden.requires_grad and not tangents[0]:
            hidden.register_hook(lambda gradient: back(tokens))

    def back(tokens: int) -> None:
        found.passes += 2 * tokens

    handle = register_module_forward_hook(hook, with_kwargs=True)  # type: ignore[call-arg]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "vmap", vmap)
        patch.setattr(joint, "DIRECTIONS", 1e9)  # all at once: what is computed again to save memory isn't counted
        try:
            yield found
        finally:
            handle.remove()
