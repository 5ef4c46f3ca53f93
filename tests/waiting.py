"""Waiting in tests: no limit decides between right and wrong, however slow or busy the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")
HANGS = 1200
"""Seconds after which something hangs, and would for ever."""


def until(found: Callable[[], Found], otherwise: Callable[[], object] = lambda: "it doesn't come") -> Found:
    """Wait until something is there or so, and return it.

    Raises:
        AssertionError: it hangs; with what ``otherwise`` says then.
    """
    deadline = time.monotonic() + HANGS
    while not (there := found()):
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.1)
    return there
