"""The ``ideal`` command in processes of its own, as users run it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.waiting import HANGS, Found, until

IDEAL = Path(sys.executable).parent / "ideal"


@dataclass
class Ended:
    status: int
    output: str
    seconds: float


class Command:
    """``ideal run`` of one config in processes of its own, with a storage and a Ray folder of its own."""

    def __init__(self, folder: Path, tree: dict[str, Any]) -> None:
        self.storage, self.config = folder / "store", folder / "config.yaml"
        self.config.write_text(yaml.safe_dump({**tree, "storage": str(self.storage)}))
        self.ray = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets need a short path
        self.output = folder / "output"
        self.environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        self.environment |= {"RAY_TMPDIR": self.ray, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

    def start(self, *arguments: str, errors: Path | None = None) -> subprocess.Popen[bytes]:
        """Start the command in the background; its output goes to a file.

        Args:
            errors: where stderr goes. Default: to the output.
        """
        with ExitStack() as files:
            output = files.enter_context(self.output.open("wb"))
            return subprocess.Popen(
                [IDEAL, *(arguments or ("run",)), self.config],
                stdout=output,
                stderr=files.enter_context(errors.open("wb")) if errors else subprocess.STDOUT,
                env=self.environment,
                cwd=self.storage.parent,
                start_new_session=True,
            )

    def __call__(self, *arguments: str) -> Ended:
        started = time.time()
        status = self.start(*arguments).wait(HANGS)
        return Ended(status, self.output.read_text(), time.time() - started)

    def records(self, kind: str = "*") -> dict[Path, tuple[int, int]]:
        """Recorded stages; a stage that ran again has another file or another time."""
        found = (self.storage / "stages").glob(f"{kind}/*/stage.json")
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}

    def processes(self) -> list[psutil.Process]:
        """Everything that this command's runs started and that still runs."""
        return processes_of(self.ray)

    def leaves_nothing_running(self) -> None:
        """Wait until all that it started has ended."""
        until(lambda: not self.processes(), self.processes)

    def wait_for(self, found: Callable[[], Found], process: subprocess.Popen[bytes]) -> Found:
        """Wait until something is there that a running command makes, and return it."""

        def is_there() -> Found:
            ended = process.poll() is not None
            there = found()
            assert there or not ended, f"it ended too early:\n{self.output.read_text()}"
            return there

        return until(is_there, lambda: f"it doesn't come:\n{self.output.read_text()}")

    def killed_and_again(self, *arguments: str, when: Callable[[], object], before: str | None = None) -> Ended:
        """The command, killed once something is there that it makes, and again: it repeats no recorded stage.

        Args:
            before: a kind of stage that the kill must come before the first record of.
        """
        process = self.start(*arguments)
        self.wait_for(when, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.leaves_nothing_running()
        recorded = self.records()
        assert before is None or not self.records(before)
        ended = self(*arguments)
        after = self.records()
        assert {path: after.get(path) for path in recorded} == recorded, "a recorded stage ran again"
        return ended

    def clean(self) -> None:
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.ray, ignore_errors=True)

    def report(self) -> dict[str, Any]:
        (path,) = (self.storage / "runs").glob("*/report.json")
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def processes_of(ray: str) -> list[psutil.Process]:
    """Everything that runs with this folder for Ray's."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_TMPDIR") == ray and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Two reports say the same: volumes and scores exactly, losses to what sums in another order change."""
    assert len(ours["iterations"]) == len(theirs["iterations"])
    for mine, other in zip(ours["iterations"], theirs["iterations"], strict=True):
        assert mine["volumes"] == other["volumes"]
        for domain, losses in other["reference"].items():
            assert mine["reference"][domain]["loss"] == pytest.approx(losses["loss"], rel=1e-5)
        assert mine["benchmarks"] == other["benchmarks"]
