"""Libraries that talk on the screen, told not to; their logs stay in their files."""

from __future__ import annotations

import logging
import os
import warnings

SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def quieten() -> None:
    """Set what workers inherit, before the libraries are imported; a user's own settings win."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("alembic", "mlflow", "lm_eval", "datasets", "httpx", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
