"""The plan made before a run counts what the run will really hold."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ideal.config import Config
from ideal.errors import BadInput
from service.cluster import Cluster
from service.data import MODEL
from service.plan import GIB, Plan, layer_blocks, plan

CLUSTER = Cluster(cpus=2, gpus=0, nodes=1, sft_workers=1, sft_cpus=2, influence_workers=2)


@pytest.fixture(scope="module")
def shapes(base: Path) -> PretrainedConfig:
    return AutoConfig.from_pretrained(base / MODEL)


def small(config: Config, **resources: int) -> Config:
    """Next to no activations, so that the factors decide."""
    return config.model_copy(update={"resources": config.resources.model_copy(update={"batch_tokens": 1, **resources})})


def planned(config: Config, shapes: PretrainedConfig, memory: int) -> Plan:
    return plan(config, shapes, CLUSTER, memory)


def test_counts_are_the_real_models(config: Config, base: Path, shapes: PretrainedConfig) -> None:
    model = AutoModelForCausalLM.from_pretrained(base / MODEL)
    found = planned(config, shapes, GIB)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    mlp = [p.numel() for name, p in model.named_parameters() if ".mlp." in name]
    assert found.tracked == sum(mlp)
    assert found.scratch == 4 * sum(mlp) * 2 * 2 * config.influence.blocks  # domains and reference sets, in fp32
    assert found.checkpoints == 3 * found.parameters * 2  # D0, D1, D2 in bf16


def test_less_memory_means_more_layer_blocks(config: Config) -> None:
    """Until a single layer is left; every plan fits what it was made for."""
    shapes = AutoConfig.for_model(
        "llama", hidden_size=128, intermediate_size=4096, num_hidden_layers=8, vocab_size=64, num_attention_heads=8
    )
    whole = planned(small(config), shapes, 8 * GIB)
    assert whole.layer_blocks == 1
    counts = []
    for share in (1.01, 0.9, 0.45, 0.33):
        found = planned(small(config), shapes, int(whole.influence * share / 0.85))
        assert found.influence <= found.available
        counts.append(found.layer_blocks)
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert counts[-1] > counts[1] > 1


def test_sft_has_the_memory_of_its_own_workers(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight influence actors share a machine, but one SFT worker has it all."""
    monkeypatch.setattr("service.plan.psutil.virtual_memory", lambda: SimpleNamespace(total=32 * GIB))
    many = Cluster(cpus=8, gpus=0, nodes=1, sft_workers=1, sft_cpus=8, influence_workers=8)
    smollm2 = AutoConfig.for_model(
        "llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, vocab_size=49152, num_attention_heads=9
    )
    found = plan(config, smollm2, many)
    assert found.sft > found.available
    assert found.sft_available == pytest.approx(0.85 * 32 * GIB)


def test_a_model_that_does_not_fit_is_said_before_anything_starts(config: Config, shapes: PretrainedConfig) -> None:
    with pytest.raises(BadInput) as problem:
        planned(config, shapes, 10**5)
    assert problem.value.where == "model.source"
    assert "GiB" in problem.value.what


def test_a_layer_that_cannot_be_solved_is_said_before_anything_starts(config: Config) -> None:
    """One wide layer: SFT fits, its eigenvectors and its blocks' gradients don't."""
    shapes = AutoConfig.for_model(
        "llama", hidden_size=256, intermediate_size=4096, num_hidden_layers=1, vocab_size=64, num_attention_heads=8
    )
    found = planned(small(config), shapes, 64 * GIB)
    with pytest.raises(BadInput) as problem:
        planned(small(config), shapes, int(found.sft * 1.1 / 0.85))
    assert problem.value.where == "influence.layers"


def test_the_configs_own_number_of_layer_blocks_wins(config: Config, base: Path) -> None:
    assert layer_blocks(small(config, layer_blocks=5), base / MODEL, CLUSTER) == 5
    assert layer_blocks(small(config), base / MODEL, CLUSTER) == 1
