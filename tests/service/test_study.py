"""A stage whose node is gone runs again; one that fails by itself doesn't."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, OutOfMemoryError, RayTaskError
from ray.train import ControllerError, WorkerGroupError

from ideal.config import Config
from ideal.errors import BadInput
from service import failures
from service.cluster import Cluster
from service.errors import StageFailed
from service.failures import lost
from service.stages import Stage, Store
from service.study import Study

STAGE = Stage("data", {"n": 1}, {})
GONE = ActorUnavailableError("no answer", b"0" * 16)


class Silent:
    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        yield


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def study(config: Config, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setattr(failures, "_logs", lambda: tmp_path)
    silent: Any = Silent()
    return Study(config, Cluster(1, 0, 1, 1, 1, 1), Store(tmp_path / "store", said.append), silent)


def failing(*errors: Exception) -> tuple[Any, list[int]]:
    """Work that raises these, one each time, and then ends; and how often it was tried."""
    left, tried = list(errors), []

    def work(folder: Path, progress: Any) -> dict[str, Any]:
        tried.append(1)
        if left:
            raise left.pop(0)
        return {"done": True}

    return work, tried


def test_a_stage_that_lost_its_actors_runs_again_and_says_so(study: Study, said: list[str]) -> None:
    work, tried = failing(GONE, ControllerError(RayTaskError("f", "trace", ObjectLostError("0", "", ""))))
    assert study.stage(STAGE, "D0 influence", work).result == {"done": True}
    assert len(tried) == 3
    assert said == [
        "D0 influence lost what it ran on (ActorUnavailableError); it runs again",
        "D0 influence lost what it ran on (ObjectLostError); it runs again",
    ]


def test_three_losses_are_a_failure(study: Study) -> None:
    work, tried = failing(GONE, GONE, GONE)
    with pytest.raises(StageFailed, match="ActorUnavailableError"):
        study.stage(STAGE, "D0 influence", work)
    assert len(tried) == 3


@pytest.mark.parametrize(
    "error",
    [
        ValueError("wrong"),
        RayTaskError("f", "trace", ValueError("wrong")),
        OutOfMemoryError("killed"),
        WorkerGroupError("lost", {0: GONE}),
    ],
)
def test_what_would_fail_again_isnt_tried_again(study: Study, error: Exception) -> None:
    work, tried = failing(error)
    with pytest.raises(StageFailed):
        study.stage(STAGE, "D0 influence", work)
    assert len(tried) == 1


def test_bad_input_comes_as_it_is(study: Study) -> None:
    work, tried = failing(BadInput("layers", "none", "name some"))
    with pytest.raises(BadInput):
        study.stage(STAGE, "D0 influence", work)
    assert len(tried) == 1


@pytest.mark.usefixtures("ray_session")
def test_an_actor_that_cant_be_made_isnt_a_lost_one() -> None:
    @ray.remote(num_cpus=0)
    class Broken:
        def __init__(self) -> None:
            raise ValueError("wrong")

        def work(self) -> None: ...

    with pytest.raises(ray.exceptions.RayActorError) as caught:
        ray.get(Broken.remote().work.remote())  # type: ignore[attr-defined]
    assert not lost(caught.value)
