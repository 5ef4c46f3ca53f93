"""Live progress: workers tell a board, the driver shows a line for every stage that runs.

On a terminal the lines are redrawn in place; in a log (a Ray job, CI) each stage prints one every ten seconds.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LOG_SECONDS = 10.0

MEASURED_UNITS, MEASURED_SECONDS = 2, 3.0
"""What a rate is taken from, at least."""

WINDOW_SECONDS = 60.0
"""And at most, unless units take longer than this: speed changes with what else the machine does."""


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


class Pace:
    """How long a stage still takes, by how fast it was lately.

    The first unit of work is left out of the rate: it holds start-up and compilation. A new total, or a count that
    falls, is the beginning of other work, of which nothing is known yet.
    """

    def __init__(self) -> None:
        self.done, self.total = 0, -1
        self.marks: list[tuple[float, int]] = []

    def update(self, done: int, total: int, now: float) -> None:
        """Take note of how far the stage is, at a time in seconds of any clock."""
        if total != self.total or done < self.done:
            self.marks = []
        elif done > self.done:
            self.marks.append((now, done))
            while len(self.marks) > MEASURED_UNITS + 1 and now - self.marks[1][0] > WINDOW_SECONDS:
                self.marks.pop(0)
        self.done, self.total = done, total

    def left(self, now: float) -> float | None:
        """Seconds until all units are done; None where there is nothing to tell it from.

        That is so before a few are, and again once the last one takes longer than all others or something follows it.
        """
        if not self.marks:
            return None
        (began, first), (latest, last) = self.marks[0], self.marks[-1]
        if last - first < MEASURED_UNITS or latest - began < MEASURED_SECONDS:
            return None
        running = (now - began) / (last - first + 1)  # as if the unit that runs were done now
        unit = max((latest - began) / (last - first), running)
        left = unit * (self.total - last) - min(now - latest, unit)
        return left if left > 0 else None


@dataclass
class Active:
    """A stage that runs: its bar, when it started, when its last line was printed, and its pace."""

    task: TaskID | None
    started: float
    shown: float
    pace: Pace


def in_words(left: float | None) -> str:
    """Of a time that is left: in seconds below two minutes, empty where it isn't known."""
    if left is None:
        return ""
    return f"{math.ceil(left)} s left" if left < 120 else f"{left / 60:.0f} min left"


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
        self._active: dict[str, Active] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._bars = Progress(
            TextColumn("{task.fields[stage]:<18}"),
            BarColumn(30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]:>11}"),
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
    def stage(self, name: str) -> Iterator[Reporter]:
        """Show a stage for as long as the context lasts; yields its reporter."""
        started = time.monotonic()
        with self._lock:
            terminal = self.console.is_terminal
            task = self._bars.add_task("starting", total=1, stage=name, left="") if terminal else None
            if not self._active:
                self._since = started
            self._active[name] = Active(task, started, started, Pace())
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
                for name, stage in self._active.items():
                    message, done, total = lines.get(name, ("starting", 0, 1))
                    self._show(name, stage, message, done, total, time.monotonic())

    def _show(self, name: str, stage: Active, message: str, done: int, total: int, now: float) -> None:
        stage.pace.update(done, total, now)
        left = in_words(stage.pace.left(now))
        if stage.task is not None:
            self._bars.update(stage.task, description=message, completed=done, total=total, left=left)
        elif now - stage.shown >= LOG_SECONDS:
            times = ", ".join(filter(None, [f"{now - stage.started:.0f} s", left]))
            self.console.print(f"  {name} {done}/{total} {message} ({times})")
            stage.shown = now
