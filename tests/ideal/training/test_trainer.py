"""A step's loss is the mean over all supervised tokens of the global batch, however it is cut up."""

from __future__ import annotations

import math
import subprocess
import sys
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ideal.config.config import SftConfig
from ideal.data.batches import batches
from ideal.data.examples import ExampleSet
from ideal.mixture import draw
from ideal.model.base import load_model, summed_loss, supervised_logits
from ideal.training.trainer import (
    DAMPING,
    SNAPSHOTS,
    Log,
    Step,
    Trainer,
    averaged_steps,
    example_losses,
    plan,
    schedule,
    train,
)
from tests.ideal.made import example_set, full_loss
from tests.tiny import make_model
from tests.waiting import HANGS

CPU = torch.device("cpu")
POOLS = {"a": example_set(20, 1, vocabulary=300), "b": example_set(9, 2, vocabulary=300, longest=20)}
VOLUMES = {"a": 13, "b": 12}
FP32 = SftConfig(precision="fp32", batch_examples=8, learning_rate=1e-3, weight_decay=0.1, clip_norm=0.5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one layer of norms to train beside its matrices."""
    return make_model(tmp_path_factory.mktemp("base") / "m", layers=1)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([flat.master.detach() for flat in trainer.flats.values()])


def trained(base: Path, config: SftConfig = FP32, batch_tokens: int = 64, **more: bool) -> tuple[Trainer, list[Log]]:
    trainer = Trainer(base, config, CPU, batch_tokens, **more)
    return trainer, list(train(trainer, POOLS, VOLUMES, seed=3))


def global_batch(step: Step) -> ExampleSet:
    """A step's examples, found by the definition of the mixture."""
    picks = [(d, int(i)) for d, v in VOLUMES.items() for i in draw(len(POOLS[d]), v, 3, d)]
    return chosen([POOLS[d][i] for d, i in (picks[p] for p in step.picks)])


def chosen(items) -> ExampleSet:  # type: ignore[no-untyped-def]
    offsets = np.cumsum([0] + [len(ids) for ids, _ in items])
    return ExampleSet(np.concatenate([i for i, _ in items]), np.concatenate([m for _, m in items]), offsets)


def reference_run(base: Path, loss_of) -> tuple[torch.nn.Module, list[float], list[float]]:  # type: ignore[no-untyped-def]
    """The same run with autograd, clip_grad_norm_ and AdamW over the model's own parameters."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    parts = [[p for p in model.parameters() if p.ndim >= 2], [p for p in model.parameters() if p.ndim < 2]]
    groups = [{"params": p, "weight_decay": d} for p, d in zip(parts, (FP32.weight_decay, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(FP32.beta1, FP32.beta2))
    losses, norms = [], []
    for step in plan(VOLUMES, FP32, 3):
        for group in optimizer.param_groups:
            group["lr"] = step.rate
        loss = loss_of(model, global_batch(step))
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), FP32.clip_norm)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, losses, norms


def token_mean(model: torch.nn.Module, examples: ExampleSet) -> torch.Tensor:
    total, count = full_loss(model, examples)
    return total / count


def mean_of_means(model: torch.nn.Module, examples: ExampleSet) -> torch.Tensor:
    """What accumulation does where each micro-batch is divided by its own count."""
    made = [batch for _, batch in batches(list(examples), 64)]
    losses = [summed_loss(supervised_logits(model, b), b) / int((b.targets >= 0).sum()) for b in made]
    return torch.stack(losses).mean()


def difference(model: torch.nn.Module, other: torch.nn.Module) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_training_is_plain_adamw_on_the_mean_over_all_tokens(base: Path) -> None:
    """Tied embeddings, clipping over all parameters, and no decay for norms are part of it."""
    trainer, logs = trained(base)
    plain, losses, norms = reference_run(base, token_mean)
    assert [log.loss for log in logs] == pytest.approx(losses, rel=1e-5)
    assert [log.norm for log in logs] == pytest.approx(norms, rel=1e-4), "clipping hides the gradient's scale"
    assert all(log.norm > FP32.clip_norm for log in logs), "clipping has to happen to be tested"
    assert difference(trainer.model, plain) < 2e-5
    wrong, _, _ = reference_run(base, mean_of_means)
    assert difference(trainer.model, wrong) > 2e-4, "a mean of micro-batch means would show"


@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_micro_batches_change_nothing(base: Path, batch_tokens: int) -> None:
    trainer, logs = trained(base)
    other, again = trained(base, batch_tokens=batch_tokens)
    assert [log.loss for log in again] == pytest.approx([log.loss for log in logs], rel=1e-5)
    assert [log.norm for log in again] == pytest.approx([log.norm for log in logs], rel=1e-4)
    torch.testing.assert_close(weights(other), weights(trainer), rtol=0, atol=2e-5)


def test_gradient_checkpointing_changes_nothing(base: Path) -> None:
    torch.testing.assert_close(
        weights(trained(base, gradient_checkpointing=True)[0]), weights(trained(base)[0]), rtol=0, atol=2e-5
    )


def worker(rank: int, folder: Path, base: Path) -> tuple[torch.Tensor, list[float]]:
    """One of two workers; they meet at a file."""
    limit = timedelta(seconds=HANGS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=limit)
    try:
        trainer, logs = trained(base)
        return weights(trainer), [log.loss for log in logs]
    finally:
        dist.destroy_process_group()


def test_two_workers_are_one(base: Path, tmp_path: Path) -> None:
    """The last batch has one example: the second worker has nothing to do in it."""
    code = f"""
import torch
from pathlib import Path
from tests.ideal.training.test_trainer import worker
torch.save(worker(1, Path({str(tmp_path)!r}), Path({str(base)!r})), {str(tmp_path / "second.pt")!r})
"""
    second = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    try:
        found = [worker(0, tmp_path, base)]
        assert second.wait(HANGS) == 0
    finally:
        second.kill()
    found.append(torch.load(tmp_path / "second.pt"))
    trainer, logs = trained(base)
    assert len(plan(VOLUMES, FP32, 3)[-1].picks) == 1
    for ended, losses in found:
        assert losses == pytest.approx([log.loss for log in logs], rel=1e-5)
        torch.testing.assert_close(ended, weights(trainer), rtol=0, atol=2e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_taken_up_again_is_the_same_run(base: Path, tmp_path: Path, precision: str) -> None:
    config = FP32.model_copy(update={"precision": precision})
    whole, logs = trained(base, config)
    broken = Trainer(base, config, CPU, 64)
    first = list(islice(train(broken, POOLS, VOLUMES, 3, averaged=1.0), 2))
    broken.save_state(tmp_path)
    resumed = Trainer(base, config, CPU, 64)
    resumed.load_state(tmp_path)
    assert first + list(train(resumed, POOLS, VOLUMES, 3, averaged=1.0)) == logs
    assert resumed.snapshots == len(logs)
    assert torch.equal(weights(resumed), weights(whole))
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_average_is_of_the_last_weights(base: Path, tmp_path: Path) -> None:
    trainer = Trainer(base, FP32, CPU, 64)
    seen = [weights(trainer) for _ in train(trainer, POOLS, VOLUMES, 3, averaged=0.6)]
    kept = [seen[number] for number in averaged_steps(len(seen), 0.6)]
    assert 1 < len(kept) == round(0.6 * len(seen)) < len(seen)
    last = trainer.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer.save_average(tmp_path)
    torch.testing.assert_close(weights(trainer), torch.stack(kept).mean(0))
    averaged = load_model(tmp_path, torch.float32).model.layers[0].mlp.up_proj.weight
    assert torch.equal(averaged, trainer.model.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(averaged, last)


def test_a_long_runs_average_is_of_a_few_snapshots() -> None:
    assert averaged_steps(10, 0.3) == [9, 8, 7]
    assert averaged_steps(10, 0.0) == []
    assert averaged_steps(3, 0.01) == [2]
    many = averaged_steps(10_000, 0.5)
    assert len(many) == SNAPSHOTS
    assert max(many) == 9_999
    assert 5_000 <= min(many) < 5_200
    assert set(np.diff(many)) <= {-156, -157}


@pytest.mark.parametrize("clip_norm", [1e6, 0.1])
def test_damping_is_what_a_run_divides_a_gradient_by(base: Path, tmp_path: Path, clip_norm: float) -> None:
    """The same batch at every step, in steps so small that its gradient stays: each weight moves by G/Λ.

    Where steps are clipped they see a part of G alone: 0.1 is a small part of this gradient's norm.
    """
    config = SftConfig(precision="fp32", learning_rate=2e-5, clip_norm=clip_norm, warmup=0.3)
    trainer, items = Trainer(base, config, CPU, 10_000), list(POOLS["a"])
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    total, count = full_loss(trainer.model, POOLS["a"])
    gradients = dict(zip(before, torch.autograd.grad(total / count, list(trainer.model.parameters())), strict=True))
    for number, rate in enumerate([1e-5, 2e-5, 2e-5, 5e-6]):
        trainer.step(Step(number, list(range(len(items))), rate), items)
    trainer.save_damping(tmp_path)
    damping = load_file(tmp_path / DAMPING)
    assert set(damping) == {name for name, p in before.items() if p.ndim >= 2}
    for name, stiffness in damping.items():
        moved = before[name] - dict(trainer.model.named_parameters())[name].detach()
        sure = gradients[name].abs() > 0.05 * gradients[name].abs().max()
        ratio = (moved * stiffness.float() / gradients[name])[sure]
        assert ratio.median() == pytest.approx(1.0, abs=0.02)
    trainer.save_state(tmp_path)
    resumed = Trainer(base, config, CPU, 10_000)
    resumed.load_state(tmp_path)
    assert all(torch.equal(value, damping[name]) for name, value in resumed.damping().items())


def test_small_steps_are_not_lost_in_bf16(base: Path) -> None:
    """A step of 1e-5 is below a bf16 weight's resolution; the fp32 master weights keep it."""
    config = SftConfig(precision="bf16", batch_examples=25, learning_rate=1e-5, epochs=40, decay="constant", warmup=0)
    trainer = Trainer(base, config, CPU, 10_000)
    before, rounded = weights(trainer), trainer.model.model.layers[0].mlp.up_proj.weight.clone()
    list(train(trainer, POOLS, VOLUMES, 3))
    moved = (weights(trainer) - before).abs()
    assert float(moved.max()) > 20 * 1e-5
    assert trainer.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert not torch.equal(trainer.model.model.layers[0].mlp.up_proj.weight, rounded)
    norm = trainer.flats["vectors"].master.detach()
    assert not torch.equal(norm, norm.bfloat16().float()), "the master keeps what the model's weights can't"
    one = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(40):
        one -= 1e-5
    assert one == 1, "in bf16 it would be lost"


def test_bf16_rounds_weights_and_nothing_else(base: Path) -> None:
    """Rotary frequencies stay fp32, as in every engine that serves the model: else distant positions shift."""
    trainer, loaded = Trainer(base, SftConfig(precision="bf16"), CPU, 64), load_model(base, torch.bfloat16)
    buffers = dict(loaded.named_buffers())
    assert buffers
    for name, value in trainer.model.named_buffers():
        assert torch.equal(value, buffers[name]), name
        assert value.dtype == buffers[name].dtype
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    examples = example_set(4, 7, vocabulary=300, longest=200)
    assert example_losses(trainer.model, examples, CPU, 1000) == example_losses(loaded, examples, CPU, 1000)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_saved_model_is_the_trained_one(base: Path, tmp_path: Path, precision: str) -> None:
    trainer, _ = trained(base, FP32.model_copy(update={"precision": precision}))
    trainer.save_model(tmp_path)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    saved = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    again = load_model(tmp_path, dtype)
    assert difference(again, trainer.model) == 0


def test_a_broken_gradient_stops_the_run_and_spares_the_weights(base: Path) -> None:
    trainer = Trainer(base, FP32, CPU, 64)
    next(trainer.model.parameters()).data[7] = torch.nan
    before = weights(trainer)
    with pytest.raises(FloatingPointError, match="step 0"):
        next(train(trainer, POOLS, VOLUMES, 3))
    assert torch.equal(weights(trainer), before)


def test_it_learns(base: Path) -> None:
    config = FP32.model_copy(update={"epochs": 6.0, "learning_rate": 3e-3})
    _, logs = trained(base, config)
    assert logs[-1].loss < 0.7 * logs[0].loss


# --- The plan ---


def test_a_plan_covers_every_epoch_with_a_shorter_last_batch() -> None:
    steps = plan(VOLUMES, FP32.model_copy(update={"epochs": 2.0}), 3)
    assert [len(step.picks) for step in steps] == [8] * 6 + [2]
    assert sorted(p for step in steps for p in step.picks) == sorted(list(range(25)) * 2)
    assert [step.number for step in steps] == list(range(7))


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.775, 0.55, 0.325, 0.1]),
        ("cosine", [0.5, 1, *(0.1 + 0.9 * (1 + math.cos(math.pi * x / 4)) / 2 for x in (1, 2, 3, 4))]),
    ],
)
def test_schedule(decay: str, expected: list[float]) -> None:
    config = SftConfig(warmup=1 / 3, decay=decay, final_rate=0.1)  # type: ignore[arg-type]
    assert [schedule(step, 6, config) for step in range(6)] == pytest.approx(expected)


def test_a_single_step_has_the_full_rate() -> None:
    assert schedule(0, 1, SftConfig()) == 1
    assert plan({"a": 3}, SftConfig(learning_rate=2e-5), 0)[0].rate == 2e-5
