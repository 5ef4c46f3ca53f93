"""A file that is as it was isn't read again; whatever else it is, it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.store import digests
from service.store.digests import Digests
from service.store.store import Records, Store, _damage
from tests.service.made import Made

STAGE = Made()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read; times of files that were just written count."""
    seen: list[str] = []
    real = hashlib.file_digest

    def counted(file: Any, kind: str) -> Any:
        seen.append(Path(file.name).name)
        return real(file, kind)

    monkeypatch.setattr("service.store.digests.hashlib.file_digest", counted)
    monkeypatch.setattr(digests, "SETTLED", -60.0)
    return seen


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("one")
    return path


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_file_is_read_once_by_all_processes(tmp_path: Path, file: Path, read: list[str]) -> None:
    for _ in range(2):
        known = Digests(tmp_path / "digests")  # as each process has its own
        assert [known.of(file), known.of(file)] == [sha("one")] * 2
    assert read == ["rows.jsonl"]


def rewritten(path: Path) -> None:
    path.write_text("two")


def exchanged(path: Path) -> None:
    times = path.stat()
    path.with_suffix(".new").write_text("two")
    os.utime(path.with_suffix(".new"), ns=(times.st_atime_ns, times.st_mtime_ns))
    path.with_suffix(".new").rename(path)


def set_back(path: Path) -> None:
    times = path.stat()
    path.write_text("two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", [rewritten, exchanged, set_back])
@pytest.mark.usefixtures("read")
def test_a_change_is_noticed_though_the_size_stays(tmp_path: Path, file: Path, change: Callable[[Path], None]) -> None:
    known = Digests(tmp_path / "digests")
    assert known.of(file) == sha("one")
    change(file)
    assert known.of(file) == Digests(tmp_path / "digests").of(file) == sha("two")


def test_a_file_that_was_just_written_is_read_again(tmp_path: Path, file: Path) -> None:
    """A second writing may leave its times as they are."""
    Digests(tmp_path / "digests").of(file)
    assert not (tmp_path / "digests").exists()


@pytest.mark.parametrize("broken", ["", "{", '["name"]\n[1, 2]\nnull\n', "\x00\n", '["rows.jsonl", [1, 2, 3], "x"]\n'])
def test_notes_that_are_broken_are_made_again(tmp_path: Path, file: Path, read: list[str], broken: str) -> None:
    (tmp_path / "digests").write_text(broken)
    assert Digests(tmp_path / "digests").of(file) == sha("one")
    assert Digests(tmp_path / "digests").of(file) == sha("one")
    assert len(read) == 1


def test_a_folder_that_cannot_be_written_costs_time_alone(tmp_path: Path, file: Path, read: list[str]) -> None:
    assert Digests(tmp_path / "not there" / "digests").of(file) == sha("one")
    assert read == ["rows.jsonl"]


@pytest.mark.usefixtures("read")
def test_notes_do_not_grow_for_ever(tmp_path: Path, file: Path) -> None:
    for number in range(300):
        file.write_text(f"{number:03}")
        Digests(tmp_path / "digests").of(file)
    assert len((tmp_path / "digests").read_text().splitlines()) < 110
    assert Digests(tmp_path / "digests").of(file) == sha("299")


def recorded(folder: Path) -> Path:
    def work(stage: Path) -> dict[str, Any]:
        (stage / "weights").write_text("one")
        return {"loss": 1.5}

    return Store(folder).run(STAGE, work).folder


def test_looking_at_records_reads_no_file_that_is_as_it_was(tmp_path: Path, read: list[str]) -> None:
    recorded(tmp_path)
    _damage.cache_clear()
    read.clear()
    assert Records(tmp_path).find(STAGE)
    assert not read
    assert Store(tmp_path).find(STAGE)
    assert read == ["weights"], "what is computed with it is read"


def test_a_rotten_byte_is_noticed_before_a_stage_is_computed_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes no time and no size; a run that only shows its records may not see it."""
    monkeypatch.setattr(digests, "SETTLED", -60.0)
    monkeypatch.setattr(digests, "_seen", lambda path: (3, 0, 0, 0))
    weights = recorded(tmp_path) / "weights"
    weights.write_text("onf")
    _damage.cache_clear()
    assert Records(tmp_path).find(STAGE)
    said: list[str] = []
    assert Store(tmp_path, said.append).find(STAGE) is None
    assert "weights: wrong checksum" in said[0]
