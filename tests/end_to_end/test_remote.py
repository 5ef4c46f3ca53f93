"""A run whose storage is an S3 bucket: it ends on one machine, and all of it is there on another."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import Command
from tests.end_to_end.tiny_run import make_tree
from tests.object_storage import ObjectStorage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
NEXT = "every stage of this run is recorded: nothing to do"


def test_a_run_goes_on_where_another_machine_left_it(tmp_path: Path) -> None:
    storage = ObjectStorage(tmp_path / "buckets")
    tree = make_tree(tmp_path)
    tree["equilibrium"]["iterations"] = 1
    command = Command(tmp_path, tree)
    command.environment |= storage.environment
    try:

        def on(machine: str, *arguments: str) -> tuple[str, ...]:
            folder = tmp_path / machine
            return (*arguments, "--set", "storage=s3://bucket/runs", "--set", f"resources.working_folder={folder}")

        first = command(*on("first", "run"))
        assert first.status == 0, first.output
        stages = {path.parent.name for path in (tmp_path / "first/stages").glob("*/*/stage.json")}
        kept = storage.folder / "bucket/runs"
        assert {path.parent.name for path in kept.glob("stages/*/*/stage.json")} == stages
        assert not list(kept.rglob("work"))
        assert len(list(kept.glob("runs/*/report.md"))) == 1
        second = command(*on("second", "run"))
        assert (second.status, NEXT in second.output) == (0, True), second.output
        assert {path.parent.name for path in (tmp_path / "second/stages").glob("*/*/stage.json")} == stages
        exported = command(*on("third", "export"), "--to", str(tmp_path / "mixture"))
        assert exported.status == 0, exported.output
        assert len((tmp_path / "mixture/train.jsonl").read_text().splitlines()) == 160
    finally:
        command.clean()
        storage.stop()
