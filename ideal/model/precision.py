"""Which arithmetic suits this machine: bf16 where it is native, and no slower than fp32 in a measured product.

Where bf16 is emulated a product takes 5 to 100 times as long as in fp32. ``python -m ideal.model.precision`` prints
what it finds here as JSON.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch

from ideal.config.config import Decided
from ideal.errors import BadInput

T = TypeVar("T")

TRIES = 30
FEW_TRIES = 3
EMULATED = 0.01
"""Seconds of a product after which a few tries are enough: it is far too slow, not held up by another process."""


class ByPrecision(dict[str, T]):
    """What each precision stands for. ``auto`` is none: it must be decided before it is computed with."""

    def __missing__(self, precision: str) -> T:
        raise BadInput(
            "precision",
            f"is still `{precision}` where something is computed",
            "call Config.decided(ideal.model.precision.probe().best) first",
        )


@dataclass(frozen=True)
class Probe:
    """What one machine has.

    Attributes:
        device: "processor" or "GPU"; the latter where there is one.
        native: whether it says that it has bf16 arithmetic.
        gflops: of matrix products, by precision: on one CPU core, or on the whole GPU.
    """

    device: str
    native: bool
    gflops: Mapping[str, float]

    @property
    def best(self) -> Decided:
        """bf16 where it is native and not slower than fp32."""
        return "bf16" if self.native and self.gflops["bf16"] >= self.gflops["fp32"] else "fp32"

    @property
    def reason(self) -> str:
        """Why, in words that follow the precision."""
        if not self.native:
            return f"this {self.device} has no native bf16"
        speeds = f"{self.gflops['bf16']:.0f} against {self.gflops['fp32']:.0f} GFLOP/s"
        return f"{'native' if self.best == 'bf16' else 'bf16 is slower'} on this {self.device}: {speeds}"

    def __str__(self) -> str:
        per = " a core" if self.device == "processor" else ""
        return f"products in bf16 {self.gflops['bf16']:.3g}, in fp32 {self.gflops['fp32']:.3g} GFLOP/s{per}"


def probe() -> Probe:
    """Ask and measure this machine: some 20 ms, 200 where bf16 is emulated."""
    on_gpu = torch.cuda.is_available()
    native = _gpu_has_bf16() if on_gpu else _processor_has_bf16()
    return Probe("GPU" if on_gpu else "processor", native, measured(torch.device("cuda" if on_gpu else "cpu")))


def measured(where: torch.device) -> dict[str, float]:
    """GFLOP/s of a matrix product in each precision, the best of several tries in turn.

    On a CPU with one thread: with several, another process that holds a core holds up every try.
    """
    side = 256 if where.type == "cpu" else 4096
    square = torch.randn(side, side, device=where)
    factors = {"fp32": square, "bf16": square.bfloat16()}
    best = dict.fromkeys(factors, float("inf"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for attempt in range(TRIES):
            for precision, factor in factors.items():
                if attempt >= FEW_TRIES and best[precision] > EMULATED:
                    continue
                started = time.perf_counter()
                factor @ factor
                if where.type == "cuda":
                    torch.cuda.synchronize(where)
                best[precision] = min(best[precision], time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return {precision: 2 * side**3 / seconds / 1e9 for precision, seconds in best.items()}


def _gpu_has_bf16() -> bool:
    return all(torch.cuda.get_device_capability(n) >= (8, 0) for n in range(torch.cuda.device_count()))


def _processor_has_bf16() -> bool:
    """oneDNN's and torch's switches count (ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY), not only what is built in.

    oneDNN says yes on every AVX-512 processor, with or without bf16 instructions, so these are asked for as well.
    """
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    built_in = torch.cpu.get_capabilities()
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and bool(built_in.get("avx512_bf16") or built_in.get("amx_bf16"))


if __name__ == "__main__":
    print(json.dumps(asdict(probe())))
