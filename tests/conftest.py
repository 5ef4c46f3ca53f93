"""What all tests share."""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: the tests need no hub, and its client waits long for one
os.environ.pop("RAY_ADDRESS", None)  # a developer's own servers are none of the tests' business
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin as they wait take the other tests' cores
os.environ.setdefault("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "1200")  # `ray start` gives up, on a busy machine too

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.tiny import make_model

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # `nohup`, or a shell's background job: what is started inherits it
        signal.signal(number, default)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama with its tokenizer; not to be written to."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model")
