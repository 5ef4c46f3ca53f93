"""SFT with weights, gradients and moments divided among the workers (FSDP2), for a model that one can't hold.

The steps are those of ``ideal.training.trainer.Trainer``, to rounding. Of n workers each keeps 1/n of every fp32
master weight, gradient sum and moment; a decoder layer's weights are gathered, in ``precision``, for as long as it
computes, and its gradients are summed over the workers in fp32 as soon as they are made. Each gathering needs all
workers, so all make as many passes: one that has fewer micro-batches than another makes a pass that counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ideal.config.config import SftConfig
from ideal.data.batches import Batch, Item, batches, by_length, length
from ideal.model.base import DTYPES, decoder, load_model, summed_loss, supervised_logits
from ideal.training.adamw import optimizer_of, stiffness, update
from ideal.training.trainer import DAMPING, Log, Step

MOMENTS = ("exp_avg", "exp_avg_sq")


class Loss(nn.Module):
    """The summed loss as a module's own forward pass, which is what FSDP gathers weights for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        return summed_loss(supervised_logits(self.model, batch), batch)


class ShardedTrainer:
    """The model and AdamW on one of several workers; every method is called by all of them.

    Args:
        folder: θ₀ in the transformers format, which every worker reads whole, into the machine's memory.
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
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        model = load_model(folder, torch.float32)
        model.train()
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        self.loss = Loss(model)
        mesh = init_device_mesh(device.type, (self.world,))
        policy = MixedPrecisionPolicy(DTYPES[config.precision], torch.float32, cast_forward_inputs=False)
        for layer in decoder(model).layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self.loss, mesh=mesh, mp_policy=policy)
        for module in self.loss.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo can't scale as it sums
                module.set_gradient_divide_factor(1.0)  # a sum over the workers, not their mean
        self.weights = dict(model.named_parameters())
        matrices, vectors = ([p for p in self.weights.values() if (p.ndim >= 2) == large] for large in (True, False))
        self.optimizer = optimizer_of(matrices, vectors, config)
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
        items = sorted(items, key=length)
        targets = sum(int(supervised[1:].sum()) for _, supervised in items)
        summed = torch.zeros((), device=self.device)
        for batch, weight in self._passes(items):
            loss = weight * self.loss(batch.to(self.device))
            loss.backward()
            summed += loss.detach()
        dist.all_reduce(summed)
        for parameter in self.weights.values():
            assert parameter.grad is not None
            parameter.grad /= targets
        norm = nn.utils.clip_grad_norm_(self.weights.values(), self.config.clip_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.rates += update(self.optimizer, step.number, step.rate, norm, self.config.clip_norm)
        self.optimizer.zero_grad()
        self.next_step = step.number + 1
        return Log(step.number, float(summed) / targets, float(norm), sum(length(item) for item in items))

    def _passes(self, items: list[Item]) -> Iterator[tuple[Batch, float]]:
        """This worker's micro-batches, and as many that weigh nothing as another worker has more."""
        shares = [items[rank :: self.world] for rank in range(self.world)]
        count = max(len(by_length([length(item) for item in share], self.batch_tokens)) for share in shares)
        own = [batch for _, batch in batches(shares[self.rank], self.batch_tokens)]
        yield from ((batch, 1.0) for batch in own)
        for _ in range(count - len(own)):
            yield batches(items[:1], self.batch_tokens)[0][1], 0.0

    @torch.no_grad()
    def take_snapshot(self) -> None:
        """Take the weights into their mean, each worker its part, in fp32 in the machine's memory."""
        self.snapshots += 1
        for name, parameter in self.weights.items():
            weights = _local(parameter).cpu()
            if name in self.means:
                self.means[name].lerp_(weights, 1 / self.snapshots)
            else:
                self.means[name] = weights.clone()

    def save_state(self, folder: Path) -> None:
        """What a retried run needs to go on after the last step: this worker's part, as safetensors."""
        tensors = {"next_step": torch.tensor(self.next_step), "rates": torch.tensor(self.rates, dtype=torch.float64)}
        tensors |= {"snapshots": torch.tensor(self.snapshots)}
        tensors |= {f"means/{name}": mean for name, mean in self.means.items()}
        for name, parameter in self.weights.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"weights/{name}": _local(parameter), f"step/{name}": state["step"]}
            tensors |= {f"{moment}/{name}": _local(state[moment]) for moment in MOMENTS}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"state-{self.rank}.safetensors")

    @torch.no_grad()
    def load_state(self, folder: Path) -> None:
        """Take up what any number of workers left."""
        count = len(list(folder.glob("state-*.safetensors")))
        ranks = [self.rank] if count == self.world else range(count)
        files = [load_file(folder / f"state-{rank}.safetensors") for rank in ranks]

        def part(key: str) -> torch.Tensor:
            if count == self.world:
                return files[0][key]
            rows = torch.cat([file[key] for file in files]).chunk(self.world)
            return rows[self.rank] if self.rank < len(rows) else rows[0][:0]

        for name, parameter in self.weights.items():
            _local(parameter).copy_(part(f"weights/{name}"))
            self.optimizer.state[parameter] = {"step": files[0][f"step/{name}"].to(self.device)} | {
                moment: _like(parameter, part(f"{moment}/{name}").to(self.device)) for moment in MOMENTS
            }
        self.next_step, self.rates = int(files[0]["next_step"]), float(files[0]["rates"])
        self.snapshots = int(files[0]["snapshots"])
        self.means = {name: part(f"means/{name}") for name in self.weights if self.snapshots}

    def save_model(self, folder: Path) -> None:
        """The trained model in the transformers format, in the run's precision, by the first worker."""
        dtype = DTYPES[self.config.precision]
        found = {name: self._whole(parameter.detach(), dtype) for name, parameter in self.weights.items()}
        if self.rank == 0:
            self.loss.model.save_pretrained(folder, state_dict=found)  # type: ignore[operator]

    @torch.no_grad()
    def save_average(self, folder: Path) -> None:
        """The mean of the snapshots as a model in the transformers format; the trainer's own is that from then on."""
        for name, parameter in self.weights.items():
            _local(parameter).copy_(self.means[name])
        self.save_model(folder)

    @torch.no_grad()
    def save_damping(self, folder: Path) -> None:
        """Λ into ``folder``, by the first worker; see ``ideal.training.adamw.stiffness``."""
        found = {}
        for name, parameter in self.weights.items():
            if parameter.ndim >= 2:
                part = stiffness(self.optimizer.state[parameter], self.optimizer.param_groups[0], self.rates)
                found[name] = self._whole(part, torch.bfloat16)
        if self.rank == 0:
            save_file(found, folder / DAMPING)

    def _whole(self, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """All workers' parts in one, on the CPU; empty at all workers but the first."""
        assert isinstance(part, DTensor)
        whole = part.full_tensor()
        return whole.to(dtype).cpu().contiguous() if self.rank == 0 else torch.empty(0)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This worker's rows."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()


def _like(tensor: torch.Tensor, rows: torch.Tensor) -> DTensor:
    """Rows as this worker's part of a tensor that is divided as another."""
    assert isinstance(tensor, DTensor)
    return DTensor.from_local(
        rows, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride(), run_check=False
    )
