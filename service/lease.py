"""A lease of CPUs: a task that holds them while an actor that holds none does the work.

A module of its own, so that the process that waits imports nothing else.
"""

from __future__ import annotations

from typing import Any

import ray


@ray.remote
def leased(method: Any, *arguments: Any) -> Any:
    """Call an actor's method and wait for what it returns."""
    return ray.get(method.remote(*arguments))
