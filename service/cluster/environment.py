"""Settings that libraries read at import: less talk, no telemetry, no hub unless one is asked for and answers."""

from __future__ import annotations

import logging
import os
import re
import secrets
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ideal.config.config import Config
    from ideal.config.inputs import BenchmarkConfig

SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}

LOCAL = ("json", "csv", "parquet", "arrow", "text")
"""Kinds of files that datasets reads from a disk."""
RAYS_TOKEN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Who sets one of these has a cluster whose token they know."""


def prepare() -> None:
    """Set what this process and its workers read; a user's own settings win."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if not any(map(os.environ.get, RAYS_TOKEN)) and not os.access(Path.home() / ".ray" / "auth_token", os.R_OK):
        # Ray reads it as it is imported, and else writes a file for all to read, which two first runs write at once.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("alembic", "mlflow", "lm_eval", "datasets", "httpx", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


def reach_hub(asked: bool) -> None:
    """Leave the model hub alone unless something of it is asked for and it answers: its client tries for minutes.

    Must come before the first import of that client, so of transformers and datasets. A user's own setting wins.
    """
    if "HF_HUB_OFFLINE" not in os.environ and not (asked and hub_answers()):
        os.environ["HF_HUB_OFFLINE"] = "1"


def hub_answers(seconds: float = 3) -> bool:
    """Whether the model hub can be reached, through a proxy where the environment names one (HTTPS_PROXY)."""
    import requests

    try:
        requests.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=seconds)
    except requests.exceptions.SSLError:
        return True  # it is there; about its certificate the client has settings of its own
    except requests.RequestException:
        return False
    return True


def asks_hub(config: Config) -> bool:
    """Whether the model, an example or a benchmark's data may come from a hub."""
    sources = [source for domain in config.domains for source in (domain.train, domain.reference)]
    sources += config.model.made.corpus if config.model.made else []
    return config.model.on_hub or any(source.hub for source in sources) or any(map(_task_asks, config.benchmarks))


def _task_asks(benchmark: BenchmarkConfig) -> bool:
    """lm-eval's tasks do; not those of the user's whose file says that they read local files."""
    if benchmark.task is None or benchmark.include is None:
        return benchmark.task is not None
    texts = [file.read_text(errors="replace") for file in Path(benchmark.include).rglob("*.y*ml")]
    named = re.compile(rf"^task:\s*{re.escape(benchmark.task)}\s*$", re.MULTILINE)
    read = [path for text in texts if named.search(text) for path in re.findall(r"^dataset_path:\s*(\S+)", text, re.M)]
    return not read or any(path not in LOCAL for path in read)
