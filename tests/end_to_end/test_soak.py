"""Many optimisations on one Ray cluster leave nothing behind but their records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import Command
from tests.end_to_end.tiny_run import make_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
RUNS = int(os.environ.get("SOAK_RUNS", "5"))
WARM = 2
"""Runs until everything has been started once."""
APART = ["unshare", "--user", "--map-root-user", "--mount"]
APART += ["sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh"]
"""With shared memory of its own: what other tests leave there is none of this one's business."""
LOGS_OF_A_RUN = 500_000
"""Bytes that Ray's processes may log in one."""


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    tree = make_tree(tmp_path)
    tree["sft"]["epochs"], tree["equilibrium"]["iterations"] = 1, 1
    tree["benchmarks"] = tree["benchmarks"][:1]
    made = Command(tmp_path, tree)
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        made.environment["TMPDIR"] = temporary  # short, since Ray's dashboard makes sockets there
        yield made
        made.clean()


def test_nothing_grows_but_the_records(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    ended = subprocess.run(
        [*APART, sys.executable, "-m", "tests.end_to_end.soak", command.config, str(RUNS)],
        env=command.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    left = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(left) == RUNS
    warm, last = left[WARM - 1], left[-1]
    with capsys.disabled():
        print(f"\nafter {WARM} runs: {warm}\nafter {RUNS}: {last}")
    for what in ("processes", "open files", "driver's open files", "driver's threads"):
        assert last[what] - warm[what] < (RUNS - WARM) / 2, f"{what}: a leak is one of each run, or more"
    assert (last["shared memory"], last["temporary files"]) == (warm["shared memory"], warm["temporary files"])
    assert last["Ray's logs"] - warm["Ray's logs"] < (RUNS - WARM) * LOGS_OF_A_RUN
    stages = set((command.storage / "stages").glob("*/*"))
    assert stages == {path.parent for path in command.records()}
    assert len(command.records("influence")) == RUNS
