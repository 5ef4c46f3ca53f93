"""A cluster that this process has joined: where its GCS doesn't answer any more, the command ends in a line.

Ray itself waits a minute for it, and ends the driver then with lines of its C++ log. One that is back sooner, as a GCS
with fault tolerance is, is waited for. What asks it is Ray's, and doesn't end the driver.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import ray
from ray._private import worker
from ray.exceptions import RayError

from service.cluster import interrupts

PATIENCE = 25
"""Seconds without an answer; Ray's own are 60 (RAY_gcs_rpc_server_reconnect_timeout_s)."""
ANSWER = 2
"""Seconds for an answer, of which Ray makes three at times."""
LOOK = 1
"""Seconds between an answer and the next question."""


def watch() -> None:
    """From now on, end this process and its command once the cluster that it has joined is gone."""
    if (client := _client()) is not None:
        threading.Thread(target=_watch, args=(client,), daemon=True).start()


def wait_while_gone() -> None:
    """What failed since the cluster is gone has nothing to say: it is back soon, or ``watch`` ends the command."""
    client = _client()
    while client is not None and not _answers(client):
        time.sleep(LOOK)


def _watch(client: Any) -> None:
    heard = time.monotonic()
    while ray.is_initialized():
        if _answers(client):
            heard = time.monotonic()
        elif time.monotonic() - heard > PATIENCE:
            interrupts.give_up(
                f"error resources.address: the cluster at {client.address} doesn't answer any more; "
                "the same command goes on from its records when it is back"
            )
            return
        time.sleep(LOOK)


def _client() -> Any:
    """What asks the GCS; None where a Ray Client (``ray://``) has none, or nothing is joined."""
    joined: Any = worker.global_worker
    return joined.gcs_client if joined.connected else None


def _answers(client: Any) -> bool:
    try:
        client.check_alive([], timeout=ANSWER)
    except RayError:
        return False
    return True
