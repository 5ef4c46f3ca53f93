"""Settings that libraries read at import: less talk, no telemetry, no waiting for a hub that doesn't answer."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from urllib.parse import urlparse

SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TOKENIZERS_PARALLELISM": "false",
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


def prepare() -> None:
    """Set what this process and its workers read; a user's own settings win."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if "HF_HUB_OFFLINE" not in os.environ and not hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("alembic", "mlflow", "lm_eval", "datasets", "httpx", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


def hub_answers(seconds: float = 3) -> bool:
    """Whether the model hub can be reached; otherwise its client would try for a minute each time."""
    hub = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((hub.hostname or "", hub.port or 443), timeout=seconds).close()
    except OSError:
        return False
    return True
