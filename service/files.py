"""What lies where in the folders of stages that others read."""

from __future__ import annotations

from pathlib import Path

from ideal.training import AVERAGE

MODEL = "model"
"""A stage's folder with a model in the transformers format."""


def for_influence(folder: Path) -> Path:
    """The model in an SFT's folder that influence is computed at: the mean of its last weights, if it was kept."""
    return folder / AVERAGE if (folder / AVERAGE).is_dir() else folder / MODEL


def train_file(data: Path, domain: str) -> Path:
    """A domain's training examples in the data stage's folder."""
    return data / f"{domain}.train.safetensors"


def reference_file(data: Path, domain: str) -> Path:
    """A domain's reference set in the data stage's folder."""
    return data / f"{domain}.reference.safetensors"
