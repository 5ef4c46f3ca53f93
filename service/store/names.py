"""What a run is called: by a fingerprint of all that its result depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ideal.config.config import Config


def run_key(config: Config) -> str:
    """The run's fingerprint: everything but where and how fast it runs."""
    identity = config.model_dump(mode="json", exclude={"resources", "tracking", "storage"})
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def run_folder(config: Config) -> Path:
    """Where the run's report is."""
    return config.root / "runs" / run_name(config)


def run_name(config: Config) -> str:
    """The config's name with the run's fingerprint: what reports and jobs are called.

    A job's name is that of its config as it was given: which precision `auto` is, is decided where it runs.
    """
    return f"{config.name}-{run_key(config)}"
