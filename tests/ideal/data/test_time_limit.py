"""Work that has had its time ends where it is, whatever thread it is in, and what comes behind it is left alone."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import pytest

from ideal.data import time_limit
from ideal.data.time_limit import in_time
from tests.waiting import HANGS, until


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The thread looks all the time, and threads take turns as often as they can."""
    monkeypatch.setattr(time_limit, "LOOK", 0.0001)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def loop() -> None:
    while True:
        try:
            int("1")
        except Exception:
            raise AssertionError from None


def test_what_does_not_end_is_ended_again_and_again() -> None:
    for _ in range(5):
        with pytest.raises(TimeoutError):
            in_time(loop, time.thread_time() + 0.01)


def test_what_ends_gives_what_it_has() -> None:
    assert in_time(lambda: 7, time.thread_time() + 1000) == 7
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 / 0, time.thread_time() + 1000)


def test_a_thread_is_ended_by_its_own_time_alone() -> None:
    """One that waits, or that another keeps from working, has all its time left."""
    found: list[str] = []

    def ends() -> None:
        with pytest.raises(TimeoutError):
            in_time(loop, time.thread_time() + 0.05)
        found.append("ended")

    threads = [threading.Thread(target=ends) for _ in range(2)]
    for thread in threads:
        thread.start()
    in_time(lambda: [thread.join() for thread in threads], time.thread_time() + 0.05)
    assert found == ["ended"] * 2


def test_nothing_is_raised_behind_work_that_ends_as_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at, raised, raise_in = threading.Event(), threading.Event(), time_limit._raise_in

    def late(thread: int, error: type[BaseException] | None) -> None:
        if error:
            looked_at.set()
            until(lambda: not time_limit._tasks)
        raise_in(thread, error)
        if error:
            raised.set()

    def ends_then() -> None:
        while not looked_at.is_set():
            pass

    monkeypatch.setattr(time_limit, "_raise_in", late)
    with suppress(TimeoutError):
        in_time(ends_then, time.thread_time() + 0.01)
    assert raised.wait(HANGS)


def test_nothing_is_raised_behind_work_that_ends_at_any_moment() -> None:
    seen = Counter[str]()

    def short() -> str:
        end = time.thread_time() + 0.0005
        while time.thread_time() < end:
            pass
        return "made"

    while min(seen["made"], seen["ended"]) < 500:
        try:
            seen[in_time(short, time.thread_time() + 0.0003 + seen.total() % 50 * 1e-5)] += 1
        except TimeoutError:
            seen["ended"] += 1
    assert not time_limit._tasks
