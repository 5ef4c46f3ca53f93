"""Ctrl-C, SIGTERM and SIGHUP at moments of real commands: one line, no process left, and the same command goes on.

Ray's folder is a long one here, as on batch systems, deeper than a socket's path may be.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.cluster.interrupts import GOES_ON
from tests.command import Command, same
from tests.end_to_end.tiny_run import make_tree
from tests.waiting import HANGS, until

pytestmark = pytest.mark.timeout(6 * HANGS)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One update; a training keeps its state often."""
    tree = make_tree(tmp_path_factory.mktemp("inputs"))
    tree["equilibrium"]["iterations"] = 1
    tree["resources"]["checkpoint_steps"] = 4
    return tree


@contextmanager
def made(folder: Path, tree: dict[str, Any]) -> Iterator[Command]:
    """A command whose Ray has a long folder."""
    command = Command(folder, tree)
    short, command.ray = command.ray, str(Path(command.ray) / ("long" * 20))
    command.environment["RAY_TMPDIR"] = command.ray
    try:
        yield command
    finally:
        command.clean()
        os.rmdir(short)


@pytest.fixture
def command(tmp_path: Path, tree: dict[str, Any]) -> Iterator[Command]:
    with made(tmp_path, tree) as command:
        yield command


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The report of a run that nothing interrupts."""
    with made(tmp_path_factory.mktemp("whole"), tree) as whole:
        ended = whole()
        assert ended.status == 0, ended.output
        whole.leaves_nothing_running()
        yield whole.report()


def interrupted(
    command: Command,
    number: signal.Signals,
    when: Callable[[psutil.Process], object],
    *arguments: str,
    times: int = 1,
) -> None:
    """Start the command and interrupt it, as a terminal does, once something is there that it makes."""
    errors = command.storage.with_name("errors")
    process = command.start(*arguments, errors=errors)
    command.wait_for(lambda: when(psutil.Process(process.pid)), process)
    for _ in range(times):
        os.killpg(process.pid, number)
    status = process.wait(HANGS)
    assert (status, errors.read_text()) == (128 + number, f"{GOES_ON}\n"), command.output.read_text()
    command.leaves_nothing_running()
    assert "Traceback" not in command.output.read_text()


def starting(name: str) -> Callable[[psutil.Process], bool]:
    """Whether a process of that name is there."""
    return lambda process: any(child.name() == name for child in process.children(recursive=True))


def kept(stages: Path, kind: str) -> list[Path]:
    """What a training goes on from."""
    return list(stages.glob(f"{kind}/*/work/kept/step-*"))


def test_while_it_imports(command: Command) -> None:
    """Before the command line is there to guard anything."""
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "run", command.config],
        stderr=subprocess.PIPE,
        env=command.environment,
        cwd=Path(__file__).parents[2],
        text=True,
    )
    started = psutil.Process(process.pid)
    until(lambda: any("pydantic_core" in f.path for each in started.children() for f in each.memory_maps()))
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == f"{GOES_ON}\n"
    assert process.returncode == 130
    assert not command.storage.exists()


@pytest.mark.parametrize(("name", "number"), [("gcs_server", signal.SIGTERM), ("raylet", signal.SIGHUP)])
def test_while_ray_starts(command: Command, name: str, number: signal.Signals) -> None:
    interrupted(command, number, starting(name))
    assert not command.records()


@pytest.mark.slow
def test_while_a_base_model_is_made(tmp_path: Path, tree: dict[str, Any]) -> None:
    corpus = [domain["train"] for domain in tree["domains"]]
    shapes = {"hidden": 64, "layers": 2, "vocabulary": 400, "batch_examples": 8}
    model = {"source": "made", "max_tokens": 256, "made": {"corpus": corpus, **shapes}}
    with made(tmp_path, {**tree, "model": model}) as command:
        stages = command.storage / "stages"
        interrupted(command, signal.SIGHUP, lambda _: kept(stages, "model"))
        assert not command.records()
        (state,) = kept(stages, "model")
        interrupted(command, signal.SIGTERM, lambda _: command.records("model"))
        assert not state.exists(), "a recorded stage keeps nothing to go on from"


@pytest.mark.slow
def test_in_every_stage(command: Command, undisturbed: dict[str, Any]) -> None:
    """One run that is interrupted in one stage after the other, and ends as if it hadn't been."""
    stages = command.storage / "stages"
    interrupted(command, signal.SIGINT, lambda _: kept(stages, "sft"), times=3)
    assert not command.records("sft")
    interrupted(command, signal.SIGTERM, lambda _: any(stages.glob("influence/*/work/*/*")))
    assert not command.records("influence")
    interrupted(command, signal.SIGHUP, lambda _: any(stages.glob("benchmark/*")))
    assert not command.records("benchmark")
    before = command.records()
    ended = command()
    assert ended.status == 0, ended.output
    assert {path: command.records().get(path) for path in before} == before, "a recorded stage ran again"
    assert len(command.report()["iterations"]) == 2
    same(command.report(), undisturbed)


@pytest.mark.slow
def test_compare_before_its_first_mixture_is_trained(command: Command) -> None:
    compare = ("compare", "--methods", "joint", "--seeds", "1")
    interrupted(command, signal.SIGINT, lambda _: command.records("model"), *compare)
    assert not command.records("reference")
    ended = command(*compare)
    assert ended.status == 0, ended.output
    assert command.records("reference")
