"""`precision: auto` is what this processor is good at; nothing is computed before it is known what that is."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch

from ideal.config.config import Config, InfluenceConfig, SftConfig
from ideal.errors import BadInput
from ideal.model import precision
from ideal.model.base import DTYPES
from ideal.model.precision import Probe, probe


def probed(**switches: str) -> Probe:
    """What a process finds under these switches, which libraries read at their start."""
    hidden = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "CUDA_VISIBLE_DEVICES")
    plain = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-m", "ideal.model.precision"]
    environment = plain | {"CUDA_VISIBLE_DEVICES": ""} | switches
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return Probe(**json.loads(ended.stdout))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="switches of x86")
@pytest.mark.parametrize("switch", [{"ONEDNN_MAX_CPU_ISA": "AVX2"}, {"ATEN_CPU_CAPABILITY": "avx2"}])
def test_each_switch_that_hides_bf16_is_honoured(switch: dict[str, str]) -> None:
    found = probed(**switch)
    assert not found.native
    assert found.best == "fp32"
    assert found.reason == "this processor has no native bf16"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
def test_a_processor_is_native_if_it_has_bf16_instructions() -> None:
    built_in: Any = torch.cpu.get_capabilities()
    assert probed().native == any(built_in.get(name) for name in ("avx512_bf16", "amx_bf16"))


def test_both_precisions_are_measured() -> None:
    gflops = probe().gflops
    assert set(gflops) == {"bf16", "fp32"}
    assert all(speed > 0 for speed in gflops.values())


def test_measuring_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        precision.measured(torch.device("cpu"))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_one_slow_try_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first product loads a library, and on a busy machine any may be held up."""
    clock = iter([0.0, 0.001, 0.0, 5.0, *[0.0, 0.001] * 1000])
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(clock))
    gflops = precision.measured(torch.device("cpu"))
    assert gflops["bf16"] == gflops["fp32"] > 0


@pytest.mark.parametrize(
    ("native", "bf16", "best", "words"),
    [
        (True, 600.0, "bf16", "native on this processor: 600 against 150 GFLOP/s"),
        (True, 150.0, "bf16", "native"),
        (True, 24.0, "fp32", "bf16 is slower on this processor: 24 against 150 GFLOP/s"),
        (False, 600.0, "fp32", "this processor has no native bf16"),
    ],
)
def test_bf16_must_be_native_and_no_slower(native: bool, bf16: float, best: str, words: str) -> None:
    found = Probe("processor", native, {"bf16": bf16, "fp32": 150.0})
    assert found.best == best
    assert words in found.reason


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_has_bf16_from_capability_8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], native: bool
) -> None:
    """Simulated: what is asked of torch, on a machine that has no GPU. One old GPU among new ones is enough."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda n: capability if n else (9, 0))
    monkeypatch.setattr(precision, "measured", lambda where: {"bf16": 2.0, "fp32": 1.0})
    assert (probe().device, probe().native) == ("GPU", native)


def test_nothing_is_computed_with_what_is_undecided() -> None:
    assert SftConfig().precision == InfluenceConfig().precision == "auto"
    with pytest.raises(BadInput, match="still `auto`"):
        DTYPES[SftConfig().precision]


def made(**sections: Any) -> Config:
    source = {"reasoning_gym": "gcd", "size": 4}
    domains = [
        {"name": name, "train": source | {"seed": seed}, "reference": source | {"seed": seed + 4}}
        for name, seed in (("a", 0), ("b", 8))
    ]
    benchmarks = [{"name": "a", "seed": 16, **source}]
    return Config.model_validate({"name": "x", "domains": domains, "benchmarks": benchmarks, **sections})


def test_a_decision_is_for_what_is_undecided_alone() -> None:
    assert made().undecided
    both = made().decided("fp32")
    assert (both.sft.precision, both.influence.precision, both.undecided) == ("fp32", "fp32", False)
    one = made(sft={"precision": "bf16"})
    assert one.undecided
    assert (one.decided("fp32").sft.precision, one.decided("fp32").influence.precision) == ("bf16", "fp32")
    assert all(solver.precision == "fp32" for solver in map(both.compared, both.fidelity.solvers))


def test_no_compared_solver_is_undecided_by_itself() -> None:
    with pytest.raises(ValueError, match="leave `precision: auto` to the section `influence`"):
        made(fidelity={"solvers": {"x": {"precision": "auto"}}})
