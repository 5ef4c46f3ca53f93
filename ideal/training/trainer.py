"""Supervised fine-tuning of θ₀ on one mixture: the loop that each worker runs.

A step's loss is the mean over **all** supervised tokens of the global batch, whatever the number of workers and
micro-batches: every worker sums its tokens' losses, gradients are summed over workers in fp32, and one division by
the batch's token count follows. Every worker knows the whole order of the data, so that count costs no message.
The arithmetic of a step is ``ideal.training.adamw``'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from ideal.config.config import SftConfig
from ideal.data.batches import Item, batches, length
from ideal.data.examples import ExampleSet
from ideal.mixture import data_order, draw
from ideal.model import lora
from ideal.model.base import DTYPES, load_model, summed_loss, supervised_counts, supervised_logits, token_losses
from ideal.training.adamw import Flat, optimizer_of, stiffness, update

DAMPING = "damping.safetensors"
"""AdamW's Λ beside a trained model."""
AVERAGE = "average"
"""The model with the mean of the last weights, beside a trained model."""
SNAPSHOTS = 32
"""Weights that such a mean is of, at most."""


@dataclass(frozen=True)
class Step:
    """One optimiser step, the same for all workers."""

    number: int
    """From 0."""
    picks: list[int]
    """Positions in the mixture: the global batch."""
    rate: float
    """Learning rate."""


@dataclass(frozen=True)
class Log:
    """What a step did."""

    step: int
    loss: float
    """Mean over the global batch's supervised tokens, nats."""
    norm: float
    """Gradient norm before clipping."""
    tokens: int
    """Input tokens of the global batch, without padding."""


def plan(volumes: Mapping[str, int], config: SftConfig, seed: int) -> list[Step]:
    """All steps of a run over a mixture."""
    order = data_order(volumes, config.epochs, seed)
    total = number_of_steps(sum(volumes.values()), config)
    return [
        Step(
            n,
            order[n * config.batch_examples : (n + 1) * config.batch_examples].tolist(),
            config.learning_rate * schedule(n, total, config),
        )
        for n in range(total)
    ]


def number_of_steps(examples: int, config: SftConfig) -> int:
    """Of a run over so many examples; the last batch may be a smaller one."""
    return math.ceil(max(1, round(examples * config.epochs)) / config.batch_examples)


def averaged_steps(total: int, share: float) -> list[int]:
    """After which steps weights are taken into the mean: ``SNAPSHOTS`` or fewer, evenly over this share at the end."""
    tail = max(round(total * share), 1 if share else 0)
    return [total - 1 - n * tail // min(tail, SNAPSHOTS) for n in range(min(tail, SNAPSHOTS))]


def schedule(step: int, total: int, config: SftConfig) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then decay to ``final_rate``."""
    warm = max(1, round(config.warmup * total))
    if step < warm:
        return (step + 1) / warm
    if config.decay == "constant":
        return 1.0
    done = (step - warm + 1) / max(1, total - warm)
    shape = (1 + math.cos(math.pi * done)) / 2 if config.decay == "cosine" else 1 - done
    return config.final_rate + (1 - config.final_rate) * shape


class Trainer:
    """The model, its fp32 master copy and AdamW, on one worker.

    Args:
        folder: θ₀ in the transformers format.
        batch_tokens: padded tokens in a micro-batch.
    """

    def __init__(
        self,
        folder: Path,
        config: SftConfig,
        device: torch.device,
        batch_tokens: int,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.config, self.device, self.batch_tokens = config, device, batch_tokens
        self.model = load_model(folder, DTYPES[config.precision] if config.lora else torch.float32, device)
        if config.lora:
            lora.add(self.model, config.lora)
        self.model.train()
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable()  # type: ignore[operator]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        matrices, vectors = ([p for p in trained if (p.ndim >= 2) == large] for large in (True, False))
        self.flats = {name: Flat(part) for name, part in (("matrices", matrices), ("vectors", vectors)) if part}
        for parameter in self.model.parameters():  # the parameters alone: rounded rotary frequencies shift positions
            parameter.data = parameter.data.to(DTYPES[config.precision])
        masters = {name: [flat.master] for name, flat in self.flats.items()}
        self.optimizer = optimizer_of(masters["matrices"], masters.get("vectors", []), config)
        self.next_step = 0
        self.rates = 0.0
        self.snapshots = 0
        self.means: dict[str, torch.Tensor] = {}

    def step(self, step: Step, items: list[Item]) -> Log:
        """Run one optimiser step; every worker calls it with the same arguments.

        Args:
            items: the global batch.

        Raises:
            FloatingPointError: the gradient isn't finite; the weights are as before.
        """
        loss = self.accumulate(items)
        norm = self.move(step)
        return Log(step.number, loss, norm, sum(length(item) for item in items))

    def accumulate(self, items: list[Item], weights: Sequence[float] | None = None) -> float:
        """Leave the gradient of a batch's mean loss in ``flats``; returns that loss.

        Args:
            items: the global batch.
            weights: [n] of every supervised token of each item. Default: 1.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        weighed = sorted(zip(items, weights or [1.0] * len(items), strict=True), key=lambda each: length(each[0]))
        total = sum(weight * int(supervised[1:].sum()) for (_, supervised), weight in weighed)
        mine = weighed[rank::world]
        summed = torch.zeros((), device=self.device)
        for flat in self.flats.values():
            flat.gradient.zero_()
        for rows, batch in batches([item for item, _ in mine], self.batch_tokens):
            moved = batch.to(self.device)
            logits = supervised_logits(self.model, moved)
            if weights is None:
                loss = summed_loss(logits, moved)
            else:
                each = torch.tensor([mine[row][1] for row in rows], device=self.device)
                loss = (token_losses(logits, moved) * each.repeat_interleave(supervised_counts(moved))).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            summed += loss.detach()
        gradients = [flat.gradient for flat in self.flats.values()]
        if world > 1:
            for tensor in [*gradients, summed]:
                dist.all_reduce(tensor)
        for gradient in gradients:
            gradient /= total
        return float(summed) / total

    def move(self, step: Step) -> float:
        """Clip the gradient and step along it; returns its norm before."""
        norm = nn.utils.clip_grad_norm_([flat.master for flat in self.flats.values()], self.config.clip_norm)
        self.rates += update(self.optimizer, step.number, step.rate, norm, self.config.clip_norm)
        for flat in self.flats.values():
            flat.write_back()
        self.next_step = step.number + 1
        return float(norm)

    @torch.no_grad()
    def take_snapshot(self) -> None:
        """Take the weights into their mean, which the first worker keeps in fp32 in the machine's memory."""
        if dist.is_initialized() and dist.get_rank():
            return
        self.snapshots += 1
        for name, flat in self.flats.items():
            weights = flat.master.detach().cpu()
            if name in self.means:
                self.means[name].lerp_(weights, 1 / self.snapshots)
            else:
                self.means[name] = weights.clone()

    def save_state(self, folder: Path) -> None:
        """What a retried run needs to go on after the last step, as safetensors."""
        tensors = {"next_step": torch.tensor(self.next_step), "rates": torch.tensor(self.rates, dtype=torch.float64)}
        tensors |= {"snapshots": torch.tensor(self.snapshots)}
        tensors |= {f"means.{name}": mean for name, mean in self.means.items()}
        for name, flat in self.flats.items():
            tensors[name] = flat.master.detach()
            tensors |= {f"{name}.{key}": value for key, value in self.optimizer.state[flat.master].items()}
        save_file(tensors, folder / "state.safetensors")

    def load_state(self, folder: Path) -> None:
        state = load_file(folder / "state.safetensors", device=str(self.device))
        for name, flat in self.flats.items():
            flat.master.data.copy_(state[name])
            flat.write_back()
            prefix = f"{name}."
            self.optimizer.state[flat.master] = {
                key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
            }
        self.next_step, self.rates = int(state["next_step"]), float(state["rates"])
        self.snapshots = int(state["snapshots"])
        self.means = {name: state[f"means.{name}"].cpu() for name in self.flats if self.snapshots}

    def damping(self) -> dict[str, torch.Tensor]:
        """Λ of every trained matrix, by its name, bf16."""
        state = self.optimizer.state[self.flats["matrices"].master]
        root = stiffness(state, self.optimizer.param_groups[0], self.rates)
        matrices = [(name, p) for name, p in self.model.named_parameters() if p.ndim >= 2 and p.requires_grad]
        parts = torch.split(root.to(torch.bfloat16), [p.numel() for _, p in matrices])
        return {name: part.view_as(p) for (name, p), part in zip(matrices, parts, strict=True)}

    def save_model(self, folder: Path) -> None:
        """The trained model, or its adapters, in the transformers format, in the run's precision."""
        self.model.save_pretrained(folder)  # type: ignore[operator]

    @torch.no_grad()
    def save_average(self, folder: Path) -> None:
        """The mean of the snapshots as a model in the transformers format; the trainer's own is that from then on."""
        for name, flat in self.flats.items():
            flat.master.copy_(self.means[name])
            flat.write_back()
        self.save_model(folder)

    def save_damping(self, folder: Path) -> None:
        """Λ into ``folder``, for influence that knows the optimiser."""
        save_file({name: part.contiguous() for name, part in self.damping().items()}, folder / DAMPING)


class Stepper(Protocol):
    """What ``train`` drives: a trainer that holds everything, or one that shares it (``ideal.training.sharded``)."""

    config: SftConfig
    next_step: int

    def step(self, step: Step, items: list[Item]) -> Log: ...

    def take_snapshot(self) -> None: ...


def train(
    trainer: Stepper,
    pools: Mapping[str, ExampleSet],
    volumes: Mapping[str, int],
    seed: int,
    averaged: float = 0.0,
) -> Iterator[Log]:
    """The remaining steps of a run, one at a time.

    Args:
        pools: each domain's training examples.
        volumes: the mixture.
        seed: of the draws and of the data's order.
        averaged: share of the steps, at the end, whose weights the trainer takes the mean of.
    """
    items = [pools[domain][int(i)] for domain, v in volumes.items() for i in draw(len(pools[domain]), v, seed, domain)]
    steps = plan(volumes, trainer.config, seed)
    taken = set(averaged_steps(len(steps), averaged))
    for step in steps[trainer.next_step :]:
        log = trainer.step(step, [items[position] for position in step.picks])
        if step.number in taken:
            trainer.take_snapshot()
        yield log


@torch.no_grad()
def example_losses(
    model: nn.Module, examples: ExampleSet, device: torch.device, batch_tokens: int
) -> tuple[list[float], list[int]]:
    """Each example's loss, summed over its supervised tokens, in nats, and how many tokens those are."""
    losses, tokens = [0.0] * len(examples), [0] * len(examples)
    for members, batch in batches(list(examples), batch_tokens):
        moved = batch.to(device)
        each = token_losses(supervised_logits(model, moved), moved)
        counts = supervised_counts(moved).tolist()
        for member, part, count in zip(members, torch.split(each.double(), counts), counts, strict=True):
            losses[member], tokens[member] = float(part.sum()), count
    return losses, tokens
