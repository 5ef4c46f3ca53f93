"""A failure as one error: which stage, which iteration, where, the log, and the next command to type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from ideal.errors import BadInput
from service.errors import StageFailed, in_a_line
from service.store.stage import Stage


def explain(error: Exception, stage: Stage[Any], name: str) -> Exception:
    """What a user should see of an error that came out of a stage: the cause, without the layers around it."""
    cause = root_cause(error)
    if isinstance(cause, BadInput):
        return cause
    text = in_a_line(cause)
    return StageFailed(
        f"{name} failed: {type(cause).__name__}: {text}\n"
        f"  stage {stage.kind} {stage.fingerprint}; logs: {_logs()}\n"
        f"  → the same command runs this stage again; finished stages are kept"
    )


def lost(error: Exception) -> bool:
    """Whether a stage lost what it ran on, an actor, a node or an object, so that another try may end well.

    Of training workers Ray Train has tried again by itself; memory that was too small once will be again.
    """
    from ray.train import WorkerGroupError  # seconds to load, and only needed where something broke

    cause = root_cause(error)
    return (
        isinstance(cause, RayError)
        and not isinstance(cause, RayTaskError | OutOfMemoryError)
        and not isinstance(error, WorkerGroupError)
        and not getattr(cause, "actor_init_failed", False)
    )


def root_cause(error: BaseException) -> BaseException:
    """The error that a worker raised, out of what Ray wrapped around it."""
    from ray.train import ControllerError, WorkerGroupError

    if isinstance(error, RayTaskError) and error.cause is not None and error.cause is not error:
        return root_cause(error.cause)
    if isinstance(error, ControllerError):
        return root_cause(error.controller_failure)
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        return root_cause(next(iter(error.worker_failures.values())))
    return error


def _logs() -> Path:
    session = ray._private.worker.global_worker.node
    return Path(session.get_session_dir_path()).resolve() / "logs" if session else Path("/tmp/ray/session_latest/logs")
