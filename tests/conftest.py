"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama with its tokenizer; not to be written to."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model")
