"""`precision: auto` is decided once for a run, by the machines that work, and goes with the run to any machine."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ideal.config.config import Config
from ideal.config.file import parse
from ideal.errors import BadInput
from ideal.model.precision import Probe
from service.cluster import precision
from service.cluster.cluster import Cluster
from service.cluster.precision import Decision, decide, decided, on_nodes, together
from service.runs import run as runs
from service.runs import sweep
from service.runs.mixtures import Inputs
from service.store.names import run_key
from tests.command import Command
from tests.ray_cluster import add_node, start_head
from tests.service.conftest import tree
from tests.service.made import Told

FAST = Probe("processor", True, {"bf16": 600.0, "fp32": 150.0})
SLOW = Probe("processor", False, {"bf16": 1.2, "fp32": 60.0})


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray may be up for other tests."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)


def on(machine: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on with the test on such a machine."""
    monkeypatch.setattr("ideal.model.precision.probe", lambda: machine)


def given(folder: Path, **sections: Any) -> Config:
    """A config as a user has it: nothing said of precision."""
    return parse({**tree(folder / "store"), **sections}, "test", folder)


def begun(configs: list[Config], said: list[str]) -> Decision:
    decision = decide(configs, said.append, begins=True)
    decision.keep(said.append)
    return decision


@pytest.mark.parametrize(("machine", "expected"), [(FAST, "bf16"), (SLOW, "fp32")])
def test_auto_is_what_the_machine_is_good_at(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, machine: Probe, expected: str
) -> None:
    on(machine, monkeypatch)
    decision = begun([given(tmp_path)], said)
    (config,) = decision.configs
    assert (config.sft.precision, config.influence.precision) == (expected, expected)
    assert str(decision) == f"{expected} ({machine.reason})"
    assert not said


def test_a_run_goes_on_elsewhere_with_what_it_began_with(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(SLOW, monkeypatch)
    first = begun([given(tmp_path)], said)
    on(FAST, monkeypatch)
    again = begun([given(tmp_path)], said)
    assert run_key(again.configs[0]) == run_key(first.configs[0])
    assert str(again) == "fp32 (as it was begun)"
    assert decided(given(tmp_path), said.append) == again.configs[0]
    assert str(begun([given(tmp_path, seed=1)], said)).startswith("bf16")
    assert not said


def test_who_reads_records_leaves_none(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    on(FAST, monkeypatch)
    assert decided(given(tmp_path), said.append).sft.precision == "bf16"
    assert not (tmp_path / "store").exists()


def test_a_run_in_bf16_is_warned_where_that_is_slow(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(FAST, monkeypatch)
    begun([given(tmp_path)], said)
    on(SLOW, monkeypatch)
    assert begun([given(tmp_path)], said).configs[0].sft.precision == "bf16"
    (warning,) = said
    assert "this processor has no native bf16" in warning
    assert "--set sft.precision=fp32" in warning


def test_what_is_given_stays(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    on(FAST, monkeypatch)
    both = given(tmp_path, sft={"precision": "fp32"}, influence={"precision": "fp32"})
    assert begun([both], said) == Decision((both,))
    assert str(begun([both], said)) == "fp32"
    assert not (tmp_path / "store" / "precision").exists()
    one = given(tmp_path, sft={"precision": "fp32"})
    assert str(begun([one], said)).startswith("SFT in fp32, influence in bf16 (native")


def test_where_and_how_fast_a_run_happens_is_no_part_of_it(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(SLOW, monkeypatch)
    begun([given(tmp_path)], said)
    on(FAST, monkeypatch)
    assert decided(given(tmp_path, resources={"batch_tokens": 64}), said.append).sft.precision == "fp32"


def test_runs_that_are_compared_share_one_precision(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them was begun alone, on a machine of another kind: the others follow it."""
    on(SLOW, monkeypatch)
    begun([given(tmp_path, seed=1)], said)
    on(FAST, monkeypatch)
    seeds = [given(tmp_path, seed=seed) for seed in range(3)]
    assert {config.sft.precision for config in begun(seeds, said).configs} == {"fp32"}
    assert {decided(config, said.append).sft.precision for config in seeds} == {"fp32"}
    assert begun([given(tmp_path, seed=9), *seeds], said).configs[0].sft.precision == "fp32"


def test_a_sweep_over_precisions_runs_none_twice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(SLOW, monkeypatch)
    settings = ["influence.precision=fp32", f"storage={path.parent / 'store'}"]
    trials = sweep.grid(path, settings, {"sft.precision": ["auto", "fp32"]})
    with pytest.raises(BadInput, match="another names, too"):
        sweep.run_trials(trials, Console(file=io.StringIO()), concurrent=1, stop_behind=False)


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"precision": "auto"}'])
def test_a_broken_record_is_bad_input(tmp_path: Path, said: list[str], body: str) -> None:
    config = given(tmp_path)
    record = config.root / precision.FOLDER / run_key(config) / precision.FILE
    record.parent.mkdir(parents=True)
    record.write_text(body)
    with pytest.raises(BadInput, match="remove it"):
        decide([config], said.append, begins=True)


def test_a_record_is_found_behind_a_url(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on on a machine that has nothing of it yet."""
    (tmp_path / "bucket").mkdir()
    storage = {"storage": f"file://{tmp_path / 'bucket'}"}
    on(SLOW, monkeypatch)
    begun([given(tmp_path, **storage, resources={"working_folder": str(tmp_path / "here")})], said)
    on(FAST, monkeypatch)
    elsewhere = given(tmp_path, **storage, resources={"working_folder": str(tmp_path / "there")})
    assert decided(elsewhere, said.append).sft.precision == "fp32"
    assert not said


def test_nodes_that_are_alike_decide_as_one_does(said: list[str]) -> None:
    assert together({"a": FAST, "b": FAST}, said.append) == ("bf16", FAST.reason)
    assert together({"a": SLOW, "b": SLOW}, said.append) == ("fp32", SLOW.reason)
    assert not said


def test_nodes_that_differ_work_in_fp32_and_are_named(said: list[str]) -> None:
    assert together({"a": FAST, "b": SLOW, "c": FAST}, said.append) == ("fp32", "1 of 3 nodes has no fast bf16")
    (notice,) = said
    assert "bf16 doesn't pay on b" in notice


def test_a_cluster_is_asked_not_the_machine_that_submits(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(FAST, monkeypatch)
    asked: list[Config] = []
    monkeypatch.setattr(precision, "on_nodes", lambda config: asked.append(config) or {"node": SLOW})
    config = given(tmp_path, resources={"address": "head:6379"})
    assert decide([config], said.append, begins=True).configs[0].sft.precision == "fp32"
    assert asked == [config]


def test_a_job_takes_auto_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ideal submit` decides nothing: its processor isn't the one that works."""
    from service import submit

    monkeypatch.setattr("ideal.model.precision.probe", lambda: pytest.fail("this machine was asked"))
    sent: dict[str, Any] = {}

    def submit_job(**job: Any) -> None:
        sent.update(job, text=(Path(job["runtime_env"]["working_dir"]) / submit.CONFIG).read_text())

    client = SimpleNamespace(list_jobs=list, submit_job=submit_job)
    monkeypatch.setattr(submit, "client", lambda address: client)
    config = given(tmp_path)
    assert submit.submit(config, Console(file=io.StringIO()), None, follow=False)
    assert sent["submission_id"] == f"tiny-{run_key(config)}"
    assert "precision" not in sent["text"]


@pytest.mark.timeout(900)
def test_a_node_without_bf16_is_named_by_a_real_cluster(tmp_path: Path) -> None:
    if precision.on_this_machine().best == "fp32":
        pytest.skip("this machine has no bf16 that could be hidden from a node")
    script = (
        "import sys; from ideal.config.file import load; from service.cluster.precision import decide;"
        "print(decide([load(sys.argv[1])], print, begins=True))"
    )
    command = Command(tmp_path, tree(tmp_path))
    try:
        environment = start_head(command.environment, cpus=1)
        add_node({**environment, "ONEDNN_MAX_CPU_ISA": "AVX2"}, cpus=1)
        environment |= {"RAY_ADDRESS": environment["IDEAL_TEST_HEAD"]}
        ended = subprocess.run(
            [sys.executable, "-c", script, command.config], env=environment, capture_output=True, text=True
        )
    finally:
        command.clean()
    assert ended.returncode == 0, ended.stderr
    notice, decision = ended.stdout.splitlines()
    assert notice.startswith("nodes differ: everything is computed in fp32, since bf16 doesn't pay on ")
    assert decision == "fp32 (1 of 2 nodes has no fast bf16)"


@pytest.mark.usefixtures("ray_session")
def test_each_node_that_can_work_is_asked(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # this test has a Ray
    (found,) = on_nodes(config).values()
    assert set(found.gflops) == {"bf16", "fp32"}
    assert found.device == precision.on_this_machine().device


@pytest.mark.parametrize("starts", [True, False])
def test_the_first_line_says_it_and_only_a_run_that_starts_is_recorded(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, starts: bool
) -> None:
    """Else one that failed on a laptop, for want of its data, would go on in fp32 where there are GPUs."""

    def check(config: Config) -> None:
        assert config.sft.precision == "fp32", "memory is that of a precision"
        if not starts:
            raise BadInput("domains.math.train", "isn't there")

    on(SLOW, monkeypatch)
    monkeypatch.setattr("service.runs.dry_run.before_start", check)
    monkeypatch.setattr(runs, "connect", lambda config: Cluster(2, 0, 1, 1, 2, 2))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    out, config = io.StringIO(), given(tmp_path)
    decision = decide([config], said.append, begins=True)
    with suppress(BadInput), runs.connected(decision, Console(file=out, width=200)):
        pass
    line = "tiny on 1 node, 2 CPUs, 0 GPUs, fp32 (this processor has no native bf16); stages in"
    assert out.getvalue().startswith(line) == starts
    assert (config.root / "precision").exists() == starts


def test_no_stage_is_named_by_what_is_undecided(tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(ValueError, match="must come first"):
        Inputs(given(tmp_path), Told(tmp_path, lambda stage, folder: {}))


def test_a_record_says_why(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    on(SLOW, monkeypatch)
    begun([given(tmp_path)], said)
    (record,) = (tmp_path / "store" / "precision").glob("*/precision.json")
    assert json.loads(record.read_text()) == {"precision": "fp32", "reason": "this processor has no native bf16"}
