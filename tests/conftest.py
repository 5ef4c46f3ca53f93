"""What all tests share."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: the tests need no hub, and its client waits long for one
os.environ.pop("RAY_ADDRESS", None)  # a developer's own servers are none of the tests' business
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin as they wait take the other tests' cores

from pathlib import Path

import pytest

from tests.tiny import make_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama with its tokenizer; not to be written to."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model")
