"""Live progress: workers tell a board, the driver shows a line for every stage that runs.

On a terminal the lines are redrawn in place; in a log (a Ray job, CI) each stage prints one every ten seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_SECONDS = 10.0


@ray.remote(num_cpus=0)
class Board:
    """The last word of every stage: (what it does, done, total)."""

    def __init__(self) -> None:
        self.lines: dict[str, tuple[str, int, int]] = {}

    def update(self, stage: str, message: str, done: int, total: int) -> None:
        self.lines[stage] = (message, done, total)

    def read(self) -> dict[str, tuple[str, int, int]]:
        return self.lines


@dataclass(frozen=True)
class Reporter:
    """What a worker holds: call it with (message, done, total). Never waits, never fails."""

    board: Any
    stage: str

    def __call__(self, message: str, done: int, total: int) -> None:
        self.board.update.remote(self.stage, message, done, total)


class Display:
    """Shows the board's lines while stages run; a context manager.

    Attributes:
        busy: seconds in which a stage ran, or several.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.board: Any = Board.remote()  # type: ignore[attr-defined]
        self.busy = 0.0
        self._since = 0.0
        self._active: dict[str, tuple[TaskID | None, float, float]] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._bars = Progress(
            TextColumn("{task.fields[stage]:<18}"),
            BarColumn(30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
        )

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._bars.start()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.console.is_terminal:
            self._bars.stop()
        ray.kill(self.board)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str, int, int], None]]:
        """Show a stage for as long as the context lasts; yields its reporter."""
        started = time.monotonic()
        with self._lock:
            task = self._bars.add_task("starting", total=1, stage=name) if self.console.is_terminal else None
            if not self._active:
                self._since = started
            self._active[name] = (task, started, started)
        reporter = Reporter(self.board, name)
        reporter("starting", 0, 1)
        try:
            yield reporter
            self.console.print(f"[green]✓[/] {name:<18} {time.monotonic() - started:6.1f} s")
        finally:
            with self._lock:
                self._active.pop(name)
                if not self._active:
                    self.busy += time.monotonic() - self._since
                if task is not None:
                    self._bars.remove_task(task)

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            try:
                lines = ray.get(self.board.read.remote(), timeout=5)
            except Exception:  # the board may be slow or gone: progress is never worth a failure
                continue
            with self._lock:
                for name, (task, started, shown) in self._active.items():
                    message, done, total = lines.get(name, ("starting", 0, 1))
                    if task is not None:
                        self._bars.update(task, description=message, completed=done, total=total)
                    elif time.monotonic() - shown >= LOG_SECONDS:
                        spent = time.monotonic() - started
                        left = f"{spent / done * (total - done):.0f} s left" if done else "starting"
                        self.console.print(f"  {name} {done}/{total} {message} ({spent:.0f} s, {left})")
                        self._active[name] = (task, started, time.monotonic())
