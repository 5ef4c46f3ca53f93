"""Influence on Ray is the same numbers however the work is cut, and the numbers are the formula's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ideal.config.config import Config, InfluenceConfig, LoraConfig, SftConfig
from ideal.data.examples import ExampleSet
from ideal.errors import BadInput
from ideal.influence.accumulate import accumulate
from ideal.influence.in_process import influence_tables
from ideal.influence.layers import input_group
from ideal.influence.sampled import Sampled
from ideal.influence.table import InfluenceTable
from ideal.mixture import draw
from ideal.model import lora
from ideal.model.base import load_model
from ideal.training.trainer import DAMPING
from service.cluster.cluster import Cluster
from service.planning.partition import by_cost
from service.stages.influence import Influence
from service.stages.sample import Sample
from service.store.layout import MODEL, TABLE, train_file
from service.store.stage import Identified, Record
from service.store.store import RECORD, Store
from tests.service.made import Made
from tests.service.made import workers as workers_of
from tests.waiting import HANGS

VOLUMES = {"math": 12, "chat": 6}
LAYERS = ["*.mlp.*"]
ADAPTERS = LoraConfig(rank=4)
TOLERANCE = 1e-3  # of the largest entry: fp32 sums in another order


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Config:
    from ideal.config.file import parse
    from tests.service.conftest import tree

    folder = tmp_path_factory.mktemp("influence")
    made = {
        **tree(folder / "store"),
        "influence": {
            "layers": LAYERS,
            "examples": 20,
            "blocks": 4,
            "precision": "fp32",
            "damping": 0.1,
            "joint": False,
        },
        "resources": {"batch_tokens": 64, "wait_seconds": HANGS},
    }
    return parse(made, "test", folder).decided("fp32")


def sample(config: Config, data: Path) -> Sample:
    return Sample(data, VOLUMES, config.influence, config.seed)


def on_ray(folder: Path, config: Config, base: Path, data: Path, workers: int, layer_blocks: int) -> dict[str, Any]:
    model, examples = (
        Record(kind, kind, place, {}, 0.0, fresh=False) for kind, place in (("sft", base), ("data", data))
    )
    settings = Identified(config.influence, config.influence.of_the_table())
    stage = Influence(
        influence=settings, lora=config.sft.lora, volumes=VOLUMES, seed=config.seed, model=model, data=examples
    )
    resources = config.resources.model_copy(update={"layer_blocks": layer_blocks})
    cluster = Cluster(cpus=2, gpus=0, nodes=1, sft_workers=1, sft_cpus=2, influence_workers=workers)
    on = workers_of(config.model_copy(update={"resources": resources}), cluster)
    return dict(stage.run(folder, on))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, ray_session: None, settings: Config, base: Path, data: Path) -> Any:
    """One actor does it all, as a recorded stage."""
    return Store(tmp_path_factory.mktemp("whole")).run(Made(), lambda f: on_ray(f, settings, base, data, 1, 1))


def test_nothing_but_the_table_remains(whole: Any) -> None:
    """Gradients and factors are many times the model: they go when the stage is recorded."""
    files = {str(path.relative_to(whole.folder)) for path in whole.folder.rglob("*")}
    assert files == {RECORD, TABLE}


@pytest.mark.parametrize(("workers", "layer_blocks", "actors"), [(2, 1, 2), (2, 2, 2)])
@pytest.mark.usefixtures("ray_session")
def test_shards_and_layer_blocks_change_nothing(
    tmp_path: Path, whole: Any, settings: Config, base: Path, data: Path, workers: int, layer_blocks: int, actors: int
) -> None:
    result = on_ray(tmp_path, settings, base, data, workers, layer_blocks)
    assert result["actors"] == actors
    assert result["layers"] == whole.result["layers"]
    ours, theirs = InfluenceTable.load(tmp_path / TABLE), InfluenceTable.load(whole.folder / TABLE)
    scale = np.abs(theirs.products).max()
    np.testing.assert_allclose(ours.products, theirs.products, atol=TOLERANCE * scale)
    np.testing.assert_allclose(ours.crowding, theirs.crowding, atol=TOLERANCE * np.abs(theirs.matrix()).max())
    np.testing.assert_array_equal(ours.domain_tokens, theirs.domain_tokens)
    np.testing.assert_array_equal(ours.reference_tokens, theirs.reference_tokens)
    np.testing.assert_allclose(ours.reference_loss, theirs.reference_loss, rtol=1e-5)


def test_the_matrix_is_the_formulas(whole: Any, settings: Config, base: Path, data: Path) -> None:
    """Mean gradients by plain autograd, the curvature as a dense matrix, solved in fp64: no code shared but the pass
    that makes A and S."""
    model = load_model(base / MODEL, torch.float32)
    names = whole.result["layers"]
    blocks = sample(settings, data).blocks()
    sums = accumulate(
        model,
        names,
        blocks,
        fisher="sampled",
        factors=True,
        seed=settings.seed,
        batch_tokens=64,
        device=torch.device("cpu"),
        done=lambda block, gradient: None,
    )
    sets = [f"train/{d}" for d in VOLUMES] + [f"reference/{d}" for d in VOLUMES]
    gradients = {name: mean_gradients(model, names, blocks, name) for name in sets}
    expected = np.zeros((len(VOLUMES), len(VOLUMES)))
    for name in names:
        factors = [x.double() / sums.positions for x in (sums.s[name], sums.a[input_group(name)])]
        shifts = [settings.influence.damping**0.5 * x.diagonal().mean() for x in factors]
        damped = [x + shift * torch.eye(len(x)) for x, shift in zip(factors, shifts, strict=True)]
        dense = torch.kron(*damped) * sums.positions
        domain = torch.stack([gradients[f"train/{d}"][name] for d in VOLUMES], 1)
        reference = torch.stack([gradients[f"reference/{d}"][name] for d in VOLUMES], 1)
        expected += (torch.linalg.solve(dense, domain).T @ reference).numpy()
    found = InfluenceTable.load(whole.folder / TABLE).matrix()
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[bool, Path]:
    """SFT stages' folders, of a whole model and of adapters; an optimiser's damping over two orders of magnitude."""
    folders = {adapters: tmp_path_factory.mktemp("checkpoint") for adapters in (False, True)}
    shutil.copytree(base / MODEL, folders[False] / MODEL)
    model = load_model(base / MODEL, torch.float32)
    lora.add(model, ADAPTERS)
    for name, parameter in model.named_parameters():
        if lora.B in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folders[True] / MODEL)  # type: ignore[operator]
    random = torch.Generator().manual_seed(0)
    for folder in folders.values():
        matrices = [
            (name, p) for name, p in load_model(folder / MODEL, torch.float32).named_parameters() if p.ndim == 2
        ]
        save_file({name: 10 ** (2 * torch.rand(p.shape, generator=random)) for name, p in matrices}, folder / DAMPING)
    return folders


@pytest.mark.parametrize(
    ("solver", "more", "layer_blocks", "adapters"),
    [
        ("identity", {}, 1, False),
        ("adam", {}, 1, False),
        ("kfac", {}, 1, False),
        ("kfac", {"damping": "schedule"}, 2, False),
        ("ekfac", {}, 1, False),
        ("adam", {"joint": True}, 1, False),
        ("kfac", {"joint": True}, 2, False),
        ("kfac", {"joint": True}, 2, True),
        ("ekfac", {}, 1, True),
    ],
)
@pytest.mark.usefixtures("ray_session")
def test_every_solver_says_on_workers_what_it_says_in_one_process(
    tmp_path: Path,
    settings: Config,
    checkpoints: dict[bool, Path],
    data: Path,
    solver: str,
    more: dict[str, Any],
    layer_blocks: int,
    adapters: bool,
) -> None:
    checkpoint = checkpoints[adapters]
    asked = {"solver": solver, "curvature_examples": 4} | more
    config = settings.model_copy(
        update={
            "influence": InfluenceConfig.model_validate(settings.influence.model_dump() | asked),
            "sft": SftConfig(lora=ADAPTERS if adapters else None, precision="fp32"),
        }
    )
    result = on_ray(tmp_path, config, checkpoint, data, 2, layer_blocks)
    sampled = Sampled(
        sample(config, data).blocks(),
        len(VOLUMES),
        config.influence,
        load_file(checkpoint / DAMPING),
        config.seed,
        64,
        torch.device("cpu"),
    )
    model = load_model(checkpoint / MODEL, torch.float32)
    right = influence_tables(model, result["layers"], sampled, [solver])[solver]
    found = InfluenceTable.load(tmp_path / TABLE)
    scale = np.abs(right.products).max()
    np.testing.assert_allclose(found.products, right.products, atol=TOLERANCE * scale)
    np.testing.assert_array_equal(found.domain_tokens, right.domain_tokens)
    np.testing.assert_allclose(found.reference_loss, right.reference_loss, rtol=1e-5)
    np.testing.assert_allclose(found.crowding, right.crowding, atol=TOLERANCE * np.abs(right.matrix()).max())
    assert not result["repaired"]
    assert all(layer.endswith((lora.A, lora.B)) == adapters for layer in result["layers"])


def mean_gradients(model: nn.Module, names: list[str], blocks: list[Any], wanted: str) -> dict[str, torch.Tensor]:
    """[d_out · d_in] fp64 gradient of a set's mean loss per supervised token, by layer."""
    weights = [model.get_parameter(f"{name}.weight").requires_grad_(True) for name in names]
    total, tokens = [torch.zeros(w.numel(), dtype=torch.float64) for w in weights], 0
    for ids, supervised in (item for block in blocks if block.set == wanted for item in block.items):
        inputs, targets = torch.from_numpy(ids).long(), torch.from_numpy(ids).long().clone()
        targets[~torch.from_numpy(supervised)] = -100
        logits = model(input_ids=inputs[None]).logits[0]
        loss = nn.functional.cross_entropy(logits[:-1], targets[1:], reduction="sum")
        for sum_, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
            sum_ += gradient.flatten().double()
        tokens += int(supervised[1:].sum())
    return {name: sum_ / tokens for name, sum_ in zip(names, total, strict=True)}


def test_an_actor_that_can_not_be_had_is_said(settings: Config, base: Path, data: Path, ray_session: None) -> None:
    short = settings.model_copy(update={"resources": settings.resources.model_copy(update={"wait_seconds": 1})})
    with pytest.raises(BadInput) as problem:
        on_ray(base, short, base, data, 3, 1)
    assert problem.value.where == "influence"


@pytest.mark.parametrize(
    ("kind", "volume", "start", "count"),
    [
        ("first", 12, 0, 12),  # 20 are asked for, the mixture holds 12
        ("first", 22, 0, 20),
        ("first", 30, 0, 20),
        ("first", 2, 0, 4),  # others fill up the 4 blocks
        ("next", 2, 2, 20),
        ("next", 12, 12, 12),  # the pool's end: none that were learned follow
        ("next", 22, 22, 2),
        ("next", 30, 24, 0),
    ],
)
def test_a_sample_is_of_what_the_mixture_holds_or_of_what_it_has_not_learned(
    settings: Config, data: Path, kind: str, volume: int, start: int, count: int
) -> None:
    pool = len(ExampleSet.load(train_file(data, "math")))
    assert pool == 24
    influence_settings = settings.influence.model_copy(update={"sample": kind})
    blocks = Sample(data, {"math": volume, "chat": 6}, influence_settings, settings.seed).blocks()
    found = [list(block.keys) for block in blocks if block.set == "train/math"]
    order = draw(pool, pool, settings.seed, "math").tolist()
    keys = [key for part in found for key in part]
    assert len(keys) == len(set(keys)) == max(count, settings.influence.blocks)
    assert set(order[start : start + count]) <= set(keys)
    assert all(found), "no block is empty"


def test_solving_is_divided_by_its_cost() -> None:
    """d³, not d: one wide layer weighs as much as many narrow ones, and an A is decomposed once."""
    shapes = {"0.up_proj": (64, 8), "0.gate_proj": (64, 8), "0.down_proj": (8, 64)}
    shapes |= {f"{n}.o_proj": (16, 16) for n in range(8)}
    parts = by_cost(list(shapes), shapes, 3)
    assert sorted(layer for part in parts for layer in part) == sorted(shapes)
    assert ["0.up_proj", "0.gate_proj"] in parts
    assert ["0.down_proj"] in parts
