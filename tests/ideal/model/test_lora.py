"""Adapters: trained as peft and autograd would, kept without their base, and what influence is of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ideal.config.config import LoraConfig, SftConfig
from ideal.config.inputs import ModelConfig
from ideal.errors import BadInput
from ideal.influence.layers import input_group, layer_shapes, tracked_layers
from ideal.mixture import draw
from ideal.model import lora
from ideal.model.base import load_model, materialise
from ideal.model.files import ADAPTER_SETTINGS, is_adapter
from ideal.training.trainer import AVERAGE, DAMPING, Trainer, plan, train
from tests.ideal.dense import (
    DOMAINS,
    REFERENCES,
    WEIGHTS,
    dense_gauss_newton,
    diagonal,
    lambdas,
    mean_gradients,
    projected,
)
from tests.ideal.made import example_set, full_loss, influence, llama
from tests.tiny import make_model

CPU = torch.device("cpu")
POOLS = {"a": example_set(20, 1, vocabulary=300), "b": example_set(9, 2, vocabulary=300, longest=20)}
VOLUMES = {"a": 20, "b": 12}
SETTINGS = SftConfig(
    precision="fp32",
    batch_examples=8,
    epochs=4,
    learning_rate=1e-2,
    weight_decay=0.1,
    lora=LoraConfig(rank=4, alpha=8, targets=["q_proj", "gate_proj", "down_proj"]),
)
IDS = torch.tensor([[5, 7, 11, 13, 17]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "m")


def trainer(base: Path, settings: SftConfig = SETTINGS, checkpointing: bool = False) -> Trainer:
    torch.manual_seed(3)
    return Trainer(base, settings, CPU, 64, checkpointing)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer, list[float]]:
    folder = tmp_path_factory.mktemp("trained")
    made = trainer(base)
    losses = [log.loss for log in train(made, POOLS, VOLUMES, seed=3, averaged=0.75)]
    made.save_model(folder / "model")
    made.save_damping(folder)
    return folder, made, losses


def test_before_training_adapters_change_nothing_and_are_all_that_is_trained(base: Path) -> None:
    model = load_model(base, torch.float32)
    wanted = model(IDS).logits
    lora.add(model, SETTINGS.lora)  # type: ignore[arg-type]
    torch.testing.assert_close(model(IDS).logits, wanted)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 3 * 2
    assert all(lora.A in name or lora.B in name for name in names)


def test_training_is_pefts_own_model_with_autograd_and_adamw(
    base: Path, trained: tuple[Path, Trainer, list[float]]
) -> None:
    torch.manual_seed(3)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "gate_proj", "down_proj"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(SETTINGS.beta1, SETTINGS.beta2), weight_decay=0.1)
    items = trained_items()
    losses = []
    for step in plan(VOLUMES, SETTINGS, 3):
        optimizer.param_groups[0]["lr"] = step.rate
        total, count = full_loss(model, [items[pick] for pick in step.picks])
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, SETTINGS.clip_norm)
        optimizer.step()
        losses.append(float(total.detach() / count))
    assert trained[2] == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < 0.95 * losses[0]
    ours = torch.cat([p.detach().flatten() for p in trained[1].model.parameters() if p.requires_grad])
    torch.testing.assert_close(ours, torch.cat([p.detach().flatten() for p in parameters]), rtol=0, atol=1e-4)


def trained_items() -> list:  # type: ignore[type-arg]
    return [POOLS[d][int(i)] for d, v in VOLUMES.items() for i in draw(len(POOLS[d]), v, 3, d)]


def test_gradient_checkpointing_changes_nothing(base: Path, trained: tuple[Path, Trainer, list[float]]) -> None:
    losses = [log.loss for log in train(trainer(base, checkpointing=True), POOLS, VOLUMES, seed=3)]
    assert losses == pytest.approx(trained[2], rel=1e-5)


def test_the_folder_holds_the_adapters_alone_and_loads_everywhere(
    base: Path, trained: tuple[Path, Trainer, list[float]]
) -> None:
    """In transformers, in peft's own class, here; and merged it is a model without adapters that says the same."""
    folder, made, _ = trained[0] / "model", trained[1], trained[2]
    made.model.eval()
    wanted = made.model(IDS).logits
    assert is_adapter(folder)
    assert (lora.base_of(folder), lora.base_of(base)) == (base, base)
    assert lora.sizes_of(folder) == (4, ["down_proj", "gate_proj", "q_proj"])
    sizes = [file.stat().st_size for file in (*folder.glob("*.safetensors"), *base.glob("*.safetensors"))]
    assert sizes[0] < sizes[1] / 4
    torch.testing.assert_close(load_model(folder, torch.float32)(IDS).logits, wanted)
    own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(own, folder)(IDS).logits, wanted)
    merged = load_model(base, torch.float32)
    assert not torch.allclose(merged(IDS).logits, wanted, atol=0.1)
    whole = lora.whole_weights(load_model(folder, torch.float32))
    assert whole.keys() == dict(merged.named_parameters()).keys()
    merged.load_state_dict(whole, strict=False)
    torch.testing.assert_close(merged(IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_storage_that_was_moved_is_whole(
    base: Path, trained: tuple[Path, Trainer, list[float]], tmp_path: Path
) -> None:
    before, now = tmp_path / "before/stages", tmp_path / "now/stages"
    shutil.copytree(base, before / "model/abc/model")
    shutil.copytree(trained[0] / "model", before / "sft/def/model")
    settings = before / "sft/def/model" / ADAPTER_SETTINGS
    named = json.loads(settings.read_text()) | {"base_model_name_or_path": str(before / "model/abc/model")}
    settings.write_text(json.dumps(named))
    wanted = load_model(before / "sft/def/model", torch.bfloat16)(IDS).logits
    before.parent.rename(now.parent)
    assert lora.base_of(now / "sft/def/model") == now / "model/abc/model"
    torch.testing.assert_close(load_model(now / "sft/def/model", torch.bfloat16)(IDS).logits, wanted, rtol=0, atol=0)


def test_a_run_that_was_stopped_goes_on_to_the_same_adapters(
    base: Path, trained: tuple[Path, Trainer, list[float]], tmp_path: Path
) -> None:
    first, second = trainer(base), trainer(base)
    steps = train(first, POOLS, VOLUMES, seed=3, averaged=0.75)
    for _ in range(2):
        next(steps)
    first.save_state(tmp_path)
    second.load_state(tmp_path)
    assert [log.loss for log in train(second, POOLS, VOLUMES, seed=3, averaged=0.75)] == trained[2][2:]
    second.save_model(tmp_path / "last")
    second.save_average(tmp_path / AVERAGE)
    kept, average = (load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("last", AVERAGE))
    for name, tensor in load_file(trained[0] / "model" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, kept[name])
    assert any((average[name] - kept[name]).abs().max() > 1e-4 for name in kept)


def test_tracked_layers_are_the_adapters(trained: tuple[Path, Trainer, list[float]]) -> None:
    """As many as the pattern's layers have, with shapes that are known without weights, and Λ for each."""
    model = load_model(trained[0] / "model", torch.float32)
    shapes = layer_shapes(AutoConfig.from_pretrained(lora.base_of(trained[0] / "model")), ["*.mlp.*"], SETTINGS.lora)
    assert list(shapes) == tracked_layers(model, ["*.mlp.*"])
    gate = "model.layers.0.mlp.gate_proj"
    assert shapes[gate + lora.A] == (4, 64)
    assert shapes[gate + lora.B] == (128, 4)
    assert len(shapes) == 2 * 2 * 2
    damping = load_file(trained[0] / DAMPING)
    assert {f"{layer}.weight": torch.Size(shape) for layer, shape in shapes.items()}.items() <= {
        name: tensor.shape for name, tensor in damping.items()
    }.items()


def test_adapters_of_layers_with_one_input_share_it() -> None:
    first, second = (input_group(f"model.layers.0.mlp.{name}{lora.A}") for name in ("gate_proj", "up_proj"))
    assert first == second
    first, second = (input_group(f"model.layers.0.mlp.{name}{lora.B}") for name in ("gate_proj", "up_proj"))
    assert first != second, "each has its own A's output"


def test_influence_over_adapters_is_the_dense_solve() -> None:
    """Of A and B, the system of both together: (H + Λ)⁻¹ between the adapters' own gradients."""
    model = llama()
    torch.manual_seed(0)
    lora.add(model, LoraConfig(rank=2, alpha=4, targets=["gate_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if lora.B in name:
            torch.nn.init.normal_(parameter, std=0.3)  # trained ones aren't 0
    model.double().requires_grad_(False)
    layers = tracked_layers(model, ["*.layers.0.mlp.*", "*.layers.1.mlp.gate_proj.*"])
    assert len(layers) == 6
    own = lambdas(model, layers=layers)
    h = dense_gauss_newton(model, layers) + torch.diag(diagonal(own))
    g, r = (torch.stack([mean_gradients(model, each, layers) for each in sets]) for sets in (DOMAINS, REFERENCES))
    right = (g @ torch.linalg.solve(h, r.T)).numpy()
    given = (model, DOMAINS, REFERENCES, WEIGHTS)
    found = influence(*given, solver="exact", schedule=own, layers=layers).matrix()
    np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-6 * np.abs(right).max())
    plain = influence(*given, solver="identity", layers=layers).matrix()
    np.testing.assert_allclose(plain, (g @ r.T).numpy(), rtol=1e-6, atol=1e-9)
    assert np.corrcoef(plain.ravel(), right.ravel())[0, 1] < 0.999
    combined = influence(*given, solver="adam", own=own, layers=layers, joint=True).matrix()
    np.testing.assert_allclose(combined, projected(g, r, torch.cat([g, r]) / diagonal(own), h), rtol=1e-6)


def test_a_target_that_is_no_layer_is_named(base: Path) -> None:
    with pytest.raises(BadInput, match=r"sft\.lora\.targets.*'gate' is no linear layer(?s:.*)the model has down_proj"):
        lora.add(load_model(base, torch.float32), LoraConfig(targets=["q_proj", "gate"]))


def test_adapters_are_no_base_model(trained: tuple[Path, Trainer, list[float]], base: Path, tmp_path: Path) -> None:
    """What they name as their base may lie anywhere."""
    folder = shutil.copytree(trained[0] / "model", tmp_path / "adapters")
    shutil.copy(base / "config.json", folder)
    with pytest.raises(BadInput, match="merge them into it first"):
        materialise(ModelConfig(source=str(folder)), tmp_path / "model")
