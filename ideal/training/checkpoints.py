"""What a training goes on from when it is killed: the state after its last kept step, in a folder of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path


def keep(kept: Path, step: int, save: Callable[[Path], None]) -> None:
    """Keep the state after a step, and none of those before it. Only a state that is whole has a step's name.

    Args:
        kept: the folder; made if it isn't there.
        step: that comes next.
        save: writes the state into a folder.
    """
    unfinished, before = kept / "unfinished", list(kept.glob("step-*"))
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save(unfinished)
    unfinished.rename(kept / f"step-{step:08}")
    for old in before:
        shutil.rmtree(old)


def latest(kept: Path) -> Path | None:
    """The folder of the last state that was kept; None if there is none."""
    return max(kept.glob("step-*"), default=None)
