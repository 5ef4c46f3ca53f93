"""Storage in an S3 bucket: what one machine recorded another finds, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyarrow.fs import FileSelector, FileType

from ideal.config.file import parse
from ideal.errors import BadInput
from service.store.remote import HERE, Remote, keep_report, remote_of
from service.store.store import RECORD, WORK, Records, Store
from tests.object_storage import ObjectStorage
from tests.service.conftest import tree
from tests.service.made import Made

STAGE = Made(settings={"seed": 1})
URL = "s3://bucket/team/ideal"
PLACE = f"stages/sft/{STAGE.fingerprint}"


class Work:
    """Makes a model of two files and counts how often it had to."""

    runs = 0

    def __call__(self, folder: Path) -> dict[str, float]:
        self.runs += 1
        (folder / "model").mkdir(parents=True)
        (folder / WORK).mkdir(exist_ok=True)
        (folder / WORK / "scratch").write_text("not kept")
        (folder / "model" / "weights").write_bytes(b"\0weights" * 1000)
        (folder / "empty").write_text("")
        return {"loss": 1.5}


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStorage]:
    served = ObjectStorage(tmp_path / "buckets")
    for name, value in served.environment.items():
        monkeypatch.setenv(name, value)
    yield served
    served.stop()


@pytest.fixture
def said() -> list[str]:
    return []


def machine(tmp_path: Path, name: str, said: list[str]) -> Store:
    """A store on a machine that has nothing yet."""
    return Store(tmp_path / name, said.append, Remote(URL))


def test_another_machine_finds_what_one_recorded(tmp_path: Path, storage: ObjectStorage, said: list[str]) -> None:
    work = Work()
    first = machine(tmp_path, "first", said).run(STAGE, work)
    assert first.fresh
    other = machine(tmp_path, "other", said)
    found = other.run(STAGE, work)
    assert (work.runs, found.fresh, found.result) == (1, False, {"loss": 1.5})
    assert found.folder == tmp_path / "other" / PLACE
    files = {path.relative_to(found.folder): path.read_bytes() for path in found.folder.rglob("*") if path.is_file()}
    assert files == {
        path.relative_to(first.folder): path.read_bytes() for path in first.folder.rglob("*") if path.is_file()
    }
    assert {str(name) for name in files} == {RECORD, "model/weights", "empty"}
    there = Records(tmp_path / "third", said.append, Remote(URL)).find(STAGE)
    assert there
    assert there.result == {"loss": 1.5}
    assert not said


def test_half_a_stage_is_none(
    tmp_path: Path, storage: ObjectStorage, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks before the record is copied: nobody takes the files for a stage, and the next run of the
    first machine copies the rest."""
    work, first = Work(), machine(tmp_path, "first", said)
    copy = Remote._copy

    def breaks(self: Remote, source: str, *more: object) -> None:
        if source.endswith(RECORD):
            raise OSError("connection reset")
        copy(self, source, *more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "_copy", breaks)
        assert first.run(STAGE, work).fresh
    assert "isn't at s3://bucket/team/ideal yet (connection reset)" in said.pop()
    assert (storage.folder / "bucket/team/ideal" / PLACE / "model/weights").exists()
    assert Records(tmp_path / "other", said.append, Remote(URL)).find(STAGE) is None
    machine(tmp_path, "first", said).run(STAGE, work)
    machine(tmp_path, "other", said).run(STAGE, work)
    assert work.runs == 1
    assert not said


def test_a_run_outlives_its_object_storage(tmp_path: Path, storage: ObjectStorage, said: list[str]) -> None:
    work, first = Work(), machine(tmp_path, "first", said)
    storage.stop()
    assert first.run(STAGE, work).result == {"loss": 1.5}
    assert "can't be fetched" in said[0]
    assert "the next run copies it" in said[-1]
    storage.start()
    first.run(STAGE, work)
    assert machine(tmp_path, "other", said).run(STAGE, work).fresh is False
    assert work.runs == 1


def test_a_byte_that_flipped_is_noticed_and_mended(tmp_path: Path, storage: ObjectStorage, said: list[str]) -> None:
    """In the bucket: the stage runs again and replaces what is there. Here: it is fetched again."""
    work = Work()
    machine(tmp_path, "first", said).run(STAGE, work)
    there = storage.folder / "bucket/team/ideal" / PLACE / "model/weights"
    broken = bytearray(there.read_bytes())
    broken[10] ^= 1
    there.write_bytes(broken)
    second = machine(tmp_path, "second", said)
    assert second.run(STAGE, work).fresh
    assert "model/weights: wrong checksum" in said.pop()
    assert not said
    here = tmp_path / "second" / PLACE / "model/weights"
    here.write_bytes(broken)
    (here.parents[1] / RECORD).touch()
    assert not machine(tmp_path, "second", said).run(STAGE, work).fresh
    assert "wrong checksum" in said.pop()
    assert here.read_bytes() != broken
    assert work.runs == 2


def test_no_object_leads_out_of_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that others write to can't put files elsewhere."""
    place = tmp_path / "bucket" / PLACE
    place.mkdir(parents=True)
    (place / RECORD).write_text("{}")
    (tmp_path / "evil").write_text("x")
    remote = Remote(f"file://{tmp_path}/bucket")
    named = SimpleNamespace(path=f"{place}/../../../../evil", type=FileType.File)  # S3 lists such a key
    listed = lambda asked: [named] if isinstance(asked, FileSelector) else HERE.get_file_info(asked)  # noqa: E731
    monkeypatch.setattr(remote, "files", SimpleNamespace(get_file_info=listed))
    with pytest.raises(OSError, match="leads out of its stage"):
        remote.fetch(PLACE, tmp_path / "here" / PLACE, RECORD)
    assert not [path for path in (tmp_path / "here").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("url", "environment", "message"),
    [
        ("s3://nobucket/x", {}, "there is no bucket 'nobucket'"),
        (URL, {"AWS_SECRET_ACCESS_KEY": "wrong"}, "can't be reached"),
        ("s4://bucket/x", {}, "can't be reached"),
    ],
)
def test_a_storage_that_can_not_be_used_is_said(
    storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch, url: str, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=message) as problem:
        Remote(url)
    assert problem.value.where == "storage"


def test_a_config_with_a_url_works_in_a_folder_of_its_own(tmp_path: Path, storage: ObjectStorage) -> None:
    made = {**tree(tmp_path), "storage": URL}
    config = parse(made, "test", tmp_path)
    assert config.root.parent == Path("~/.ideal").expanduser()
    assert config.root != parse({**made, "storage": URL + "2"}, "test", tmp_path).root
    own = parse({**made, "resources": {"working_folder": str(tmp_path / "shared")}}, "test", tmp_path)
    assert own.root == tmp_path / "shared"
    found = remote_of(own)
    assert found
    assert found.url == URL
    assert remote_of(parse(tree(tmp_path), "test", tmp_path)) is None
    with pytest.raises(BadInput, match="a URL holds no credentials"):
        parse({**made, "storage": "s3://key:secret@bucket/x"}, "test", tmp_path)
    (own.root / "runs" / "tiny").mkdir(parents=True)
    (own.root / "runs" / "tiny" / "report.md").write_text("found")
    assert keep_report(own, own.root / "runs" / "tiny") is None
    assert (storage.folder / "bucket/team/ideal/runs/tiny/report.md").read_text() == "found"
