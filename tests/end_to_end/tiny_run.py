"""A whole run small enough for a test: its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import make_model
from tests.waiting import HANGS

VOLUMES = {"sums": 24, "words": 112, "echo": 24}


def make_tree(folder: Path, sft_workers: int = 1) -> dict[str, Any]:
    """The config's tree; its model and data are put into ``folder``.

    Args:
        sft_workers: one takes half the time of two, which start each other by Ray Train.
    """
    rows = [{"question": f"Say {n} twice.", "answer": f"{n} {n}"} for n in range(1000, 1160)]
    (folder / "echo.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = settings(make_model(folder / "model", layers=2, hidden=64), folder / "echo.jsonl")
    for part in ("train", "reference"):
        made["domains"][2][part]["fields"] = {"prompt": "question", "completion": "answer"}
    made["resources"]["sft_workers"] = sft_workers
    return made


def settings(model: Path, echo: Path) -> dict[str, Any]:
    """Three domains that a random model learns something of in forty steps, the starting volumes far from right.

    The first update lowers the loss by 4 %; what the second does is small, and taken, so nothing is decided by a hair.
    """
    sums = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
    words = {"min_word_len": 3, "max_word_len": 5}

    def made(task: str, options: dict[str, int], seed: int, size: int) -> dict[str, Any]:
        return {"reasoning_gym": task, "options": options, "seed": seed, "size": size}

    return {
        "name": "tiny",
        "model": {"source": str(model), "max_tokens": 256},
        "domains": [
            {
                "name": "sums",
                "volume": VOLUMES["sums"],
                "train": made("chain_sum", sums, 0, 128),
                "reference": made("chain_sum", sums, 1000, 32),
            },
            {
                "name": "words",
                "volume": VOLUMES["words"],
                "train": made("spell_backward", words, 0, 160),
                "reference": made("spell_backward", words, 1000, 32),
            },
            {
                "name": "echo",
                "volume": VOLUMES["echo"],
                "train": {"files": [str(echo)], "rows": [0, 128]},
                "reference": {"files": [str(echo)], "rows": [128, 160]},
            },
        ],
        "benchmarks": [
            {**made("chain_sum", sums, 2000, 8), "name": "sums", "max_new_tokens": 8},
            {**made("spell_backward", words, 2000, 8), "name": "words", "max_new_tokens": 8},
        ],
        "sft": {"epochs": 4, "learning_rate": 3e-3, "batch_examples": 16, "precision": "fp32"},
        "influence": {"layers": ["*.mlp.*"], "examples": 64, "blocks": 4, "precision": "fp32"},
        "equilibrium": {
            "iterations": 2,
            "m": 0.4,
            "normalise": "largest",
            "tolerance": 0.0,
            "sure": 0.5,
            "max_rise": 0.1,
        },
        "resources": {"influence_workers": 1, "vllm_cpu_cache": 0.125, "wait_seconds": HANGS},
    }
