"""A limit on the processor time of a piece of Python of which nobody knows beforehand whether it ends.

One thread of the process looks at all such pieces now and then, and raises an exception in the thread of one that has
had its time; so a limit costs what takes a moment only some microseconds. It is processor time, since a busy machine,
or one that was stopped for a while, is no reason to give something up.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Made = TypeVar("Made")
LOOK = 0.5
"""Seconds between looks."""


class _Overdue(BaseException):
    """What ends a piece of work; no ``except Exception`` within takes it for its own."""


@dataclass(eq=False, slots=True)
class _Task:
    """A piece of work in a thread; ``told`` and ``aimed`` are the looking thread's, before and after it raises."""

    thread: int
    clock: int
    deadline: float
    over: bool = False
    told: bool = False
    aimed: bool = False


_tasks: set[_Task] = set()
_starting = threading.Lock()
_looking: threading.Thread | None = None


def in_time(work: Callable[[], Made], deadline: float) -> Made:
    """What some work gives, if it does before this thread's ``time.thread_time()`` is ``deadline``.

    It is ended between two of its steps, never within one long step of C.

    Raises:
        TimeoutError: it takes longer.
    """
    thread = threading.get_ident()
    task = _Task(thread, time.pthread_getcpuclockid(thread), deadline)
    _look()
    try:
        try:
            _tasks.add(task)
            return work()
        finally:
            _settle(task)
    except _Overdue:  # from the work, or from just behind it
        _settle(task)
        raise TimeoutError from None


def _settle(task: _Task) -> None:
    """Nothing is raised any more behind this."""
    task.over = True
    _tasks.discard(task)
    if task.told:
        while not task.aimed:
            time.sleep(0.001)
        _raise_in(task.thread, None)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """In that thread, between two of its steps; ``None`` takes back what hasn't been raised yet."""
    what = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


def _look() -> None:
    """Have the looking thread run; a process that was forked hasn't it any more."""
    global _looking
    if _looking is None or not _looking.is_alive():
        with _starting:
            if _looking is None or not _looking.is_alive():
                _looking = threading.Thread(target=_keep_looking, daemon=True)
                _looking.start()


def _keep_looking() -> None:
    while True:
        time.sleep(LOOK)
        for task in list(_tasks):
            if not task.over and time.clock_gettime(task.clock) > task.deadline:
                task.aimed = False
                task.told = True
                if not task.over:
                    _raise_in(task.thread, _Overdue)
                task.aimed = True
