"""What lies where in the folders of stages that others read."""

from __future__ import annotations

from pathlib import Path

MODEL = "model"
"""A stage's folder with a model in the transformers format."""

TABLE = "influence.safetensors"
"""The influence table in an influence's folder."""


def for_influence(folder: Path) -> Path:
    """The model in an SFT's folder that influence is computed at: the mean of its last weights, if it was kept."""
    from ideal.training.trainer import AVERAGE  # which loads torch

    return folder / AVERAGE if (folder / AVERAGE).is_dir() else folder / MODEL


def train_file(data: Path, domain: str) -> Path:
    """A domain's training examples in the examples or data stage's folder."""
    return data / f"{domain}.train.safetensors"


def questions_file(examples: Path, domain: str) -> Path:
    """What a domain's examples ask, as fingerprints, in the examples stage's folder."""
    return examples / f"{domain}.questions.safetensors"


def reference_file(data: Path, domain: str) -> Path:
    """A domain's reference set in the examples or data stage's folder."""
    return data / f"{domain}.reference.safetensors"
