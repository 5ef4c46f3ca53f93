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

from ideal.config.config import Config
from ideal.errors import BadInput
from service.cluster import failures
from service.cluster.cluster import Cluster
from service.cluster.failures import lost
from service.errors import StageFailed
from service.runs.runner import OnWorkers
from service.store.store import Store
from tests.service.made import Made

GONE = ActorUnavailableError("no answer", b"0" * 16)


class Silent:
    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        yield


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def run(config: Config, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> OnWorkers:
    monkeypatch.setattr(failures, "_logs", lambda: tmp_path)
    silent: Any = Silent()
    return OnWorkers(config, Cluster(1, 0, 1, 1, 1, 1), Store(tmp_path / "store", said.append), silent)


class Failing(Made):
    """A stage whose work raises these errors, one each time, and then ends; it knows how often it was tried."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__(settings={"n": 1})
        self.__dict__ |= {"left": list(errors), "tried": []}

    def run(self, folder: Path, on: Any) -> dict[str, Any]:
        self.tried.append(1)  # type: ignore[attr-defined]
        if self.left:  # type: ignore[attr-defined]
            raise self.left.pop(0)  # type: ignore[attr-defined]
        return {"done": True}


def test_a_stage_that_lost_its_actors_runs_again_and_says_so(run: OnWorkers, said: list[str]) -> None:
    stage: Any = Failing(GONE, ControllerError(RayTaskError("f", "trace", ObjectLostError("0", "", ""))))
    assert run(stage, "D0 influence").result == {"done": True}
    assert len(stage.tried) == 3
    assert said == [
        "D0 influence lost what it ran on (ActorUnavailableError); it runs again",
        "D0 influence lost what it ran on (ObjectLostError); it runs again",
    ]


def test_three_losses_are_a_failure(run: OnWorkers) -> None:
    stage: Any = Failing(GONE, GONE, GONE)
    with pytest.raises(StageFailed, match="ActorUnavailableError"):
        run(stage, "D0 influence")
    assert len(stage.tried) == 3


@pytest.mark.parametrize(
    "error",
    [
        ValueError("wrong"),
        RayTaskError("f", "trace", ValueError("wrong")),
        OutOfMemoryError("killed"),
        WorkerGroupError("lost", {0: GONE}),
    ],
)
def test_what_would_fail_again_isnt_tried_again(run: OnWorkers, error: Exception) -> None:
    stage: Any = Failing(error)
    with pytest.raises(StageFailed):
        run(stage, "D0 influence")
    assert len(stage.tried) == 1


def test_bad_input_comes_as_it_is(run: OnWorkers) -> None:
    stage: Any = Failing(BadInput("layers", "none", "name some"))
    with pytest.raises(BadInput):
        run(stage, "D0 influence")
    assert len(stage.tried) == 1


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
