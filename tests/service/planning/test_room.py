"""What can't fit is refused before the first stage, by every command that computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import AutoConfig

from ideal.config.config import Config
from ideal.errors import BadInput
from service.cluster.cluster import Cluster
from service.outcome import Outcome, Trial
from service.planning import room
from service.planning.memory import GIB
from service.planning.plan import estimate, worker_memory
from service.runs import run
from service.runs.sweep import run_trials
from service.store.layout import MODEL

CLUSTER = Cluster(2, 0, 1, sft_workers=1, sft_cpus=2, influence_workers=1)
QUIET = Console(quiet=True)


class Started(Exception):
    """The first stage would run."""


@pytest.fixture
def config(config: Config, base: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run of a tiny model, on a cluster that isn't there."""

    def starts(*_: object, **__: object) -> None:
        raise Started

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("service.runs.run.connect", lambda config: CLUSTER)
    monkeypatch.setattr("service.runs.run.Display", starts)
    monkeypatch.setattr("service.runs.sweep.Queue", starts)
    return config.model_copy(
        update={"model": config.model.model_copy(update={"source": str(base / MODEL), "max_tokens": 64})}
    )


def ideal_run(config: Config) -> None:
    run.run(config, QUIET)


def ideal_fidelity(config: Config) -> None:
    run.fidelity(config, QUIET)


def ideal_sweep(config: Config) -> None:
    """Of several trials one is too large, not the first."""
    small = config.model_copy(update={"seed": 7})
    trials = [Trial(name, {}, each) for name, each in (("a", small), ("b", config))]
    run_trials(trials, QUIET, concurrent=1, stop_behind=False)


COMMANDS = [ideal_run, ideal_fidelity, ideal_sweep]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_fits_starts(config: Config, command: Callable[[Config], None]) -> None:
    with pytest.raises(Started):
        command(config)


@pytest.mark.parametrize("command", COMMANDS)
def test_too_little_memory_is_said_before_any_stage(
    config: Config, command: Callable[[Config], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.planning.plan.psutil.virtual_memory", lambda: SimpleNamespace(total=2**20))
    with pytest.raises(BadInput, match="GiB"):
        command(config)
    assert not list(config.root.rglob("stage.json"))


@pytest.mark.parametrize("command", COMMANDS)
def test_too_small_a_disk_is_said_before_any_stage(
    config: Config, command: Callable[[Config], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.planning.room.shutil.disk_usage", lambda _: SimpleNamespace(free=2**10))
    with pytest.raises(BadInput, match=r"storage: .* GiB are needed"):
        command(config)
    assert not list(config.root.rglob("stage.json"))


def test_an_influence_that_cannot_be_had_is_no_matter_of_a_method_without_one(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    influence = config.influence.model_copy(update={"solver": "ekfac", "joint": False})
    config = config.model_copy(update={"influence": influence})
    shapes = AutoConfig.for_model(
        "llama", hidden_size=256, intermediate_size=4096, num_hidden_layers=1, vocab_size=64, num_attention_heads=8
    )
    monkeypatch.setattr("service.planning.room.shapes_of", lambda _: shapes)
    need = int(estimate(config, shapes, CLUSTER, 64 * GIB).sft * 1.1 / 0.85)
    machine = replace(CLUSTER, memory=need)
    with pytest.raises(BadInput, match=r"influence\.layers"):
        room.check_runs([config], machine, [])
    room.check_runs([config.model_copy(update={"method": "joint"})], machine, [])


def test_a_method_that_holds_more_than_sft_is_told_so(config: Config, base: Path) -> None:
    """DoReMi's proxy has the reference model beside it; the mean of SFT's last weights would be as large."""
    config = config.model_copy(update={"influence": config.influence.model_copy(update={"averaged": 0.0})})
    found = estimate(config, AutoConfig.from_pretrained(base / MODEL), CLUSTER)
    machine = replace(CLUSTER, memory=int((found.sft + found.parameters) / 0.85))
    room.check_runs([config.model_copy(update={"method": "joint"})], machine, [])
    with pytest.raises(BadInput, match="method: doremi, by one worker"):
        room.check_runs([config.model_copy(update={"method": "doremi"})], machine, [])


def needed(configs: list[Config], outcomes: list[Outcome] | None = None) -> int:
    there = {folder for outcome in outcomes or [] for folder in outcome.checkpoints}
    return room.check_runs(configs, CLUSTER, there)[0]


def test_disk_counts_every_checkpoint_that_stays_once(config: Config, base: Path, outcome: Outcome) -> None:
    """D0 to D3 and what an influence is computed from; of runs that differ in m D0 is one; what is there is no need."""
    found = estimate(config, AutoConfig.from_pretrained(base / MODEL), CLUSTER)
    alone = needed([config])
    assert alone - found.scratch == 4 * found.checkpoint
    other = config.model_copy(update={"equilibrium": config.equilibrium.model_copy(update={"m": 0.3})})
    assert needed([config, other]) == alone + 3 * found.checkpoint
    joint, doge = (config.model_copy(update={"method": method}) for method in ("joint", "doge"))
    assert needed([config, joint]) == alone, "Joint SFT is D0"
    assert needed([config, joint, doge]) == alone + found.checkpoint
    assert needed([config.model_copy(update={"method": "base"})]) == 0, "it isn't trained"
    left_out = config.model_copy(update={"method": "leave_one_out"})
    assert needed([config, left_out]) == alone + len(config.domains) * found.checkpoint
    seed = config.model_copy(update={"seed": 1})
    assert needed([config, seed]) == alone + 4 * found.checkpoint
    (outcome.iterations[0].sft.folder / "weights").write_bytes(bytes(found.checkpoint))
    assert needed([config], [outcome]) == alone - found.checkpoint - _steps(outcome)


def _steps(outcome: Outcome) -> int:
    """Bytes of what else the accepted ones' folders hold."""
    kept = [iteration.sft.folder / "steps.json" for iteration in outcome.accepted]
    return sum(path.stat().st_size for path in kept)


def test_a_long_training_needs_room_for_its_state(config: Config, base: Path) -> None:
    found = estimate(config, AutoConfig.from_pretrained(base / MODEL), CLUSTER)
    long = config.model_copy(update={"resources": config.resources.model_copy(update={"checkpoint_steps": 1})})
    assert needed([long]) - needed([config]) == max(0, found.state - found.scratch)


def test_a_clusters_workers_have_their_own_nodes_memory() -> None:
    """Ray packs them: as many as a node has CPUs share it."""
    many = Cluster(32, 0, 4, sft_workers=4, sft_cpus=2, influence_workers=16, memory=64 * GIB)
    assert worker_memory(many, 16) == 8 * GIB
    assert worker_memory(many, 2) == 32 * GIB
    assert worker_memory(replace(many, gpus=8), 8) == 64 * GIB
