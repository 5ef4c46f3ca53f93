"""A GCS that is away for a moment is waited for; one that is gone ends the command (end_to_end kills a real one)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RpcError

from service.cluster import joined_ray
from service.cluster.joined_ray import PATIENCE


class Gcs:
    """A GCS that is away for some spans of time, on a clock that waiting moves, and nothing else."""

    address = "10.0.0.1:6379"

    def __init__(self, *away: tuple[float, float], left: float = 10 * PATIENCE) -> None:
        self.away, self.left, self.now = away, left, 0.0
        self.lines: list[str] = []

    def check_alive(self, _: list[bytes], timeout: float) -> list[bool]:
        if any(start <= self.now < end for start, end in self.away):
            self.now += timeout
            raise RpcError("Timed out while waiting for GCS to become available.")
        return []

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Gcs], Gcs]:
    """Has a GCS be the one that was joined."""

    def joined(gcs: Gcs) -> Gcs:
        monkeypatch.setattr(joined_ray, "time", SimpleNamespace(monotonic=lambda: gcs.now, sleep=gcs.sleep))
        monkeypatch.setattr(joined_ray.interrupts, "give_up", gcs.lines.append)
        monkeypatch.setattr(joined_ray, "_client", lambda: gcs)
        monkeypatch.setattr(ray, "is_initialized", lambda: gcs.now < gcs.left)
        return gcs

    return joined


def test_one_that_is_gone_ends_the_command_well_before_ray_does(of: Callable[[Gcs], Gcs]) -> None:
    gcs = of(Gcs((40, 10_000)))
    joined_ray._watch(gcs)
    assert 40 + PATIENCE <= gcs.now < 40 + 40
    (line,) = gcs.lines
    assert line == (
        "error resources.address: the cluster at 10.0.0.1:6379 doesn't answer any more; "
        "the same command goes on from its records when it is back"
    )


def test_one_that_is_back_in_time_ends_nothing_however_often(of: Callable[[Gcs], Gcs]) -> None:
    gcs = of(Gcs((10, 30), (35, 55), (60, 80)))
    joined_ray._watch(gcs)
    assert not gcs.lines
    assert gcs.now >= gcs.left, "it watches until the cluster is left"


def test_what_fails_meanwhile_waits_until_it_is_back(of: Callable[[Gcs], Gcs]) -> None:
    gcs = of(Gcs((0, 20)))
    joined_ray.wait_while_gone()
    assert gcs.now >= 20


def test_where_nothing_is_joined_there_is_nothing_to_wait_for() -> None:
    joined_ray.wait_while_gone()
