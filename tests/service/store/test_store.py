"""A stage happens once, whole or not at all, whoever asks for it and however often."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ideal.config.config import Config
from ideal.errors import BadInput
from service.runs.optimisation import optimise
from service.runs.runner import Recorded
from service.store.stage import Identified, Record, Stage
from service.store.store import FORMAT, RECORD, WORK, Records, Store, Unfinished, _damage
from tests.service.made import Made, Told
from tests.waiting import HANGS, until

DATA, OTHER_DATA = (Record("data", name, Path(), {}, 0.0, fresh=False) for name in ("abc", "abd"))
STAGE = Made(settings={"epochs": 1.0}, inputs=[DATA])
Work = Callable[[Path], dict[str, Any]]


class Counted:
    """A stage's work: two files and a result. It knows how often it ran and what it found."""

    def __init__(self) -> None:
        self.runs, self.found = 0, set[str]()

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.runs += 1
        self.found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
        assert not (folder / RECORD).exists()  # the record comes last
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_bytes(bytes(range(256)))
        (folder / "steps.json").write_text("[]")
        return {"loss": 1.5}


class Broken(Exception):
    pass


@pytest.fixture(autouse=True)
def forget() -> None:
    """What a process has verified it doesn't verify again; a new process does."""
    _damage.cache_clear()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> Store:
    return Store(tmp_path, said.append)


@pytest.fixture
def recorded(store: Store) -> Record[Any]:
    made = store.run(STAGE, Counted())
    _damage.cache_clear()
    return made


def test_a_stage_runs_once_and_its_record_says_all(store: Store) -> None:
    work = Counted()
    first = store.run(STAGE, work)
    second = Store(store.root).run(STAGE, work)
    assert work.runs == 1
    assert (first.fresh, second.fresh) == (True, False)
    assert second.result == first.result == {"loss": 1.5}
    body = json.loads((first.folder / RECORD).read_text())
    assert set(body["files"]) == {"model/weights", "steps.json"}
    assert (body["kind"], body["version"]) == ("sft", 1)
    assert body["fields"] == {"settings": {"epochs": 1.0}, "inputs": ["abc"]}


def test_finding_a_record_writes_nothing(store: Store, recorded: Record[Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in recorded.folder.rglob("*")}
    store.run(STAGE, Counted())
    assert {path: path.stat().st_mtime_ns for path in recorded.folder.rglob("*")} == before


class Newer(Made):
    version = 2


class Another(Made):
    kind = "another"


@pytest.mark.parametrize(
    "other",
    [
        Made(settings={"epochs": 2.0}, inputs=[DATA]),
        Made(settings={"epochs": 1.0}, inputs=[OTHER_DATA]),
        Made(settings={"epochs": 1.0}),
        Newer(settings={"epochs": 1.0}, inputs=[DATA]),
        Another(settings={"epochs": 1.0}, inputs=[DATA]),
    ],
)
def test_another_setting_input_version_or_kind_is_another_stage(other: Made) -> None:
    assert other.fingerprint != STAGE.fingerprint


def test_the_order_of_settings_is_no_setting() -> None:
    one, other = Made(settings={"a": 1, "b": 2}), Made(settings={"b": 2, "a": 1})
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize(
    "value",
    [Path("/tmp"), {1, 2}, float("nan"), {1: "a key that isn't text"}, object(), [1, {"deep": Path()}], b"bytes"],
    ids=["path", "set", "nan", "key", "object", "deep", "bytes"],
)
def test_what_has_no_stable_form_names_no_stage(value: Any) -> None:
    with pytest.raises(TypeError, match=r"sft\.settings\.x.*no stable form"):
        _ = Made(settings={"x": value}).fingerprint


def test_what_only_says_where_something_lies_is_no_part_of_the_name() -> None:
    here, there, changed = (
        Made(settings={"x": Identified(Path(place), content)}) for place, content in (("a", 1), ("b", 1), ("a", 2))
    )
    assert here.fingerprint == there.fingerprint != changed.fingerprint


class Halted(Exception):
    """At the last stage that a test asks for."""


def stages(config: Config) -> dict[str, str]:
    """Fingerprints that a run of the config starts with, by kind."""

    def answer(stage: Stage[Any], folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {"pool": 24, "reference": 12, "account": {"train": {}}, "content": "same"}
        if stage.kind == "examples":
            found = {part: {"rows": 24, "rejected": {}} for part in ("train", "reference")}
        if stage.kind == "reference":
            found = {"loss": 1.0, "tokens": 1}
        if stage.kind == "influence":
            raise Halted
        return {"math": found, "chat": found}

    with tempfile.TemporaryDirectory() as folder:
        run = Told(Path(folder), answer)
        with pytest.raises(Halted):
            optimise(config, run)
    return {stage.kind: stage.fingerprint for _, stage in run.asked}


def test_where_and_how_fast_changes_no_stage(config: Config) -> None:
    """The same run on another cluster, with another tracking server, takes the records there are."""
    resources = config.resources.model_copy(
        update={"sft_workers": 2, "influence_workers": 2, "layer_blocks": 3, "batch_tokens": 99, "wait_seconds": 1}
    )
    tracking = config.tracking.model_copy(update={"uri": "http://elsewhere"})
    assert stages(config.model_copy(update={"resources": resources, "tracking": tracking})) == stages(config)


@pytest.mark.parametrize(
    ("section", "field", "value", "changed"),
    [
        ("model", "max_tokens", 77, {"examples", "data"}),  # the examples that come of it are the same
        ("sft", "learning_rate", 1.0, {"sft", "reference", "influence"}),
        ("influence", "damping", 0.7, {"influence"}),
        ("influence", "resamples", 7, set()),
        ("equilibrium", "m", 0.7, set()),
    ],
)
def test_a_setting_changes_the_stages_that_depend_on_it_and_no_other(
    config: Config, section: str, field: str, value: object, changed: set[str]
) -> None:
    """A sweep over m trains D0 and computes its influence once."""
    other = config.model_copy(update={section: getattr(config, section).model_copy(update={field: value})})
    before, after = stages(config), stages(other)
    assert {kind for kind in before if before[kind] != after[kind]} == changed


@pytest.mark.parametrize(
    ("update", "changed"),
    [
        ({"limit": 2, "metric": "score", "max_new_tokens": 9, "chat": False, "system": "x", "name": "y"}, set()),
        ({"num_fewshot": 2}, {"data"}),
        ({"seed": 4001}, {"data"}),
    ],
)
def test_a_benchmark_reads_no_row_again_and_trains_nothing_again(
    config: Config, update: dict[str, object], changed: set[str]
) -> None:
    """As long as it asks for none of the examples: what they are then is what counts."""
    (benchmark,) = config.benchmarks
    other = config.model_copy(update={"benchmarks": [benchmark.model_copy(update=update)]})
    before, after = stages(config), stages(other)
    assert {kind for kind in before if before[kind] != after[kind]} == changed
    more = config.model_copy(update={"benchmarks": [benchmark, benchmark.model_copy(update={"seed": 9000})]})
    after = stages(more)
    assert {kind for kind in before if before[kind] != after[kind]} == {"data"}


def test_the_most_rows_that_may_be_unusable_change_no_stage(config: Config) -> None:
    assert stages(config.model_copy(update={"max_rejected": 0.5})) == stages(config)


def test_a_seed_changes_training_and_not_the_data(config: Config) -> None:
    before, after = stages(config), stages(config.model_copy(update={"seed": 1}))
    assert {kind for kind in before if before[kind] != after[kind]} == {"sft", "reference", "influence"}


def flip(path: Path) -> None:
    """Change one byte and leave the size and the time as they were."""
    content, times = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("damage", [flip, Path.unlink])
@pytest.mark.parametrize("name", ["model/weights", "steps.json"])
def test_a_damaged_file_is_noticed_and_the_stage_runs_again(
    store: Store, recorded: Record[Any], said: list[str], damage: Callable[[Path], None], name: str
) -> None:
    damage(recorded.folder / name)
    work = Counted()
    assert store.run(STAGE, work).fresh
    assert work.runs == 1
    assert work.found == {WORK}  # nothing of the damaged folder is taken over
    assert len(said) == 1
    assert name in said[0]
    _damage.cache_clear()
    assert store.find(STAGE) is not None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"loss": 1.5', '"loss": 0.5'),
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
    ],
)
def test_a_damaged_record_is_noticed_and_the_stage_runs_again(
    store: Store, recorded: Record[Any], said: list[str], damage: Callable[[str], str]
) -> None:
    """A changed number in the record is as wrong as a changed weight."""
    path = recorded.folder / RECORD
    path.write_text(damage(path.read_text()))
    again = store.run(STAGE, Counted())
    assert again.fresh
    assert again.result == {"loss": 1.5}
    assert RECORD in said[0]


def test_a_folder_without_a_record_never_happened(store: Store, recorded: Record[Any]) -> None:
    (recorded.folder / RECORD).unlink()
    (recorded.folder / f"{RECORD}.tmp").write_text("{")  # as a crash while writing the record leaves it
    assert store.find(STAGE) is None
    work = Counted()
    assert store.run(STAGE, work).fresh
    assert work.found == {WORK}
    assert set(json.loads((recorded.folder / RECORD).read_text())["files"]) == {"model/weights", "steps.json"}


def test_a_retry_finds_its_work_folder_and_nothing_else_half_written(store: Store) -> None:
    def fails(folder: Path) -> dict[str, Any]:
        (folder / WORK / "checkpoint").write_text("step 5")
        (folder / "half").mkdir()
        (folder / "half" / "file").write_text("half")
        (folder / "steps.json").write_text("half")
        raise Broken

    with pytest.raises(Broken):
        store.run(STAGE, fails)
    assert store.find(STAGE) is None
    work = Counted()
    done = store.run(STAGE, work)
    assert work.found == {WORK, f"{WORK}/checkpoint"}
    assert not (done.folder / WORK).exists()


def test_a_failure_leaves_the_stage_free_for_the_next(store: Store) -> None:
    """The lock goes with the try that held it."""

    def fails(folder: Path) -> dict[str, Any]:
        raise Broken

    with pytest.raises(Broken):
        store.run(STAGE, fails)
    assert store.run(STAGE, Counted()).fresh


def test_two_that_want_one_stage_run_it_once(store: Store, said: list[str]) -> None:
    started, go_on = threading.Event(), threading.Event()
    work = Counted()

    def slow(folder: Path) -> dict[str, Any]:
        started.set()
        assert go_on.wait(HANGS)
        return work(folder)

    found: list[Record] = []
    first = threading.Thread(target=lambda: found.append(store.run(STAGE, slow)))
    second = threading.Thread(target=lambda: found.append(Store(store.root, said.append).run(STAGE, work)))
    first.start()
    assert started.wait(HANGS)
    second.start()
    until(lambda: said)
    assert "waiting" in said[0]
    assert not found  # neither has it yet
    go_on.set()
    first.join(HANGS)
    second.join(HANGS)
    assert work.runs == 1
    assert sorted(each.fresh for each in found) == [False, True]


def test_a_waiting_run_does_the_stage_itself_if_the_other_fails(store: Store, said: list[str]) -> None:
    started = threading.Event()

    def fails(folder: Path) -> dict[str, Any]:
        started.set()
        until(lambda: said)
        raise Broken

    def first() -> None:
        with pytest.raises(Broken):
            store.run(STAGE, fails)

    thread = threading.Thread(target=first)
    thread.start()
    assert started.wait(HANGS)
    assert Store(store.root, said.append).run(STAGE, Counted()).fresh
    thread.join(HANGS)


def test_a_storage_that_was_removed_is_named(store: Store) -> None:
    """Whatever a stage says of the files that it doesn't find, and though its workers make its own folder again."""

    def work(folder: Path) -> dict[str, Any]:
        shutil.rmtree(store.root)
        folder.mkdir(parents=True)
        raise FileNotFoundError("x.safetensors")

    with pytest.raises(BadInput, match="was removed while the run went on"):
        store.run(STAGE, work)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_the_storages(store: Store, code: int) -> None:
    def fails(folder: Path) -> dict[str, Any]:
        raise OSError(code, "full")

    with pytest.raises(BadInput) as problem:
        store.run(STAGE, fails)
    assert problem.value.where == "storage"
    assert str(store.root) in problem.value.what
    assert store.find(STAGE) is None


FULL = """
import safetensors.torch, sys, torch, torch.distributed.checkpoint
from pathlib import Path
from ideal.errors import BadInput
from service.store.store import Store
from tests.service.made import Made

store, stage = Store(Path(sys.argv[1]), print), Made()
many = torch.zeros(2**20)
ways = {
    "python": lambda folder: (folder / "weights").write_bytes(bytes(4 * 2**20)),
    "safetensors": lambda folder: safetensors.torch.save_file({"w": many}, folder / "weights"),
    "torch": lambda folder: torch.save(many, folder / "weights"),
    "checkpoint": lambda folder: torch.distributed.checkpoint.save({"w": many}, checkpoint_id=folder / "weights"),
    "numpy": lambda folder: many.numpy().tofile(folder / "weights"),
}
for name, way in ways.items():
    try:
        store.run(stage, way)
    except BadInput as problem:
        print(name, problem.where, store.find(stage), flush=True)
def small(folder):
    (folder / "weights").write_bytes(bytes(2**19))
    return {"bytes": 2**19}
print("recorded:", store.run(stage, small).result)
"""
ROOT = Path(__file__).parents[3]
WAYS = ["python", "safetensors", "torch", "checkpoint", "numpy"]


def test_a_disk_of_a_megabyte_is_full_and_serves_again(tmp_path: Path) -> None:
    """A file system of its own, in a namespace of its own; what the failed stage left there makes room for the next."""
    room = tmp_path / "room"
    room.mkdir()
    inside = f'mount -t tmpfs -o size=1m none "{room}" && exec "$@"'
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside, "sh"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system of their own")
    done = subprocess.run(
        [*alone, sys.executable, "-c", FULL, str(room)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    wanted = [*(f"{way} storage None" for way in WAYS), "recorded: {'bytes': 524288}"]
    assert done.stdout.splitlines()[-len(wanted) :] == wanted, done.stderr


def test_a_clock_that_jumps_changes_neither_seconds_nor_what_is_recorded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def jumps(folder: Path) -> dict[str, Any]:
        monkeypatch.setattr("time.time", lambda: 0.0)
        return {"value": 1}

    done = store.run(STAGE, jumps)
    assert 0 <= done.seconds < HANGS
    assert not store.run(STAGE, jumps).fresh


def test_other_errors_of_files_are_not_the_storages(store: Store) -> None:
    def fails(folder: Path) -> dict[str, Any]:
        raise FileNotFoundError("reference")

    with pytest.raises(FileNotFoundError):
        store.run(STAGE, fails)


def test_storage_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="storage"):
        Store(tmp_path / "file")


def test_looking_at_records_runs_nothing(store: Store) -> None:
    run = Recorded(Records(store.root))
    with pytest.raises(Unfinished, match="sft"):
        run(STAGE, "D0 SFT")
    store.run(STAGE, Counted())
    assert run(STAGE, "D0 SFT").result == {"loss": 1.5}


def test_an_earlier_versions_storage_is_named_once(tmp_path: Path, said: list[str]) -> None:
    """Its stages have other names: without a word a user would wonder why everything runs again."""
    (tmp_path / "stages" / "sft" / "0123").mkdir(parents=True)
    for _ in range(2):
        Store(tmp_path, said.append)
    assert len(said) == 1
    assert f"{tmp_path} holds stages of an earlier version" in said[0]
    Store(tmp_path / "new", said.append)
    assert (tmp_path / "new" / FORMAT).exists()
    assert len(said) == 1
