"""Wrong answers are seen: the more of a domain's are wrong, the less it is worth, by retraining and by prediction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.command import Command
from tests.end_to_end.codes import MADE, SFT, file
from tests.waiting import HANGS

WRONG = {"right": 0.0, "quarter": 0.25, "half": 0.5, "all": 1.0}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_a_domain_falls_with_its_share_of_wrong_answers(tmp_path: Path) -> None:
    """Four domains that differ by nothing else; what each is worth to right answers alone."""
    domains = [
        {
            "name": name,
            "volume": 96,
            "train": file(tmp_path, "plain", name, 192, 1000 * number) | {"wrong": share},
            "reference": file(tmp_path, "plain", f"{name}-reference", 48, 10_000 + 100 * number),
        }
        for number, (name, share) in enumerate(WRONG.items())
    ]
    command = Command(
        tmp_path,
        {
            "name": "noise",
            "model": {
                "source": "made",
                "max_tokens": 64,
                "made": {"corpus": [file(tmp_path, "corpus", "corpus", 480, 20_000)], **MADE},
            },
            "domains": domains,
            "benchmarks": [{"name": "unused", "reasoning_gym": "chain_sum", "size": 4}],
            "sft": SFT,
            "resources": {"wait_seconds": HANGS},
            "influence": {"blocks": 4, "examples": 96, "precision": "fp32"},
            "fidelity": {"seeds": 4, "change": 0.5, "modes": ["steps"], "solvers": {"default": {}}},
        },
    )
    try:
        ended = command("fidelity")
        assert ended.status == 0, ended.output
        (path,) = (command.storage / "fidelity").glob("*/fidelity.json")
        steps = json.loads(path.read_text())["modes"]["steps"]
        for moves in (steps["actual"], steps["predicted"]["default"]):
            worth = -np.array(moves).mean(1)
            assert worth.argsort().tolist() == [3, 2, 1, 0], worth
    finally:
        command.clean()
