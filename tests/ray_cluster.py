"""A Ray cluster as users start it: ``ray start``, with a token."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path

BIN = Path(sys.executable).parent
PORTS = range(20_000, 32_000)
"""Between those that Ray's workers take and those that the kernel gives to whoever asks for any."""


def start_head(environment: dict[str, str], cpus: int) -> dict[str, str]:
    """Start a head on ports of its own; returns the environment in which its users, and further nodes, reach it."""
    port, dashboard, agent, client, metrics = _free_ports(5)
    environment = {
        **environment,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a-token-of-this-test-alone-0123456789",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    start = ["--head", f"--num-cpus={cpus}", f"--port={port}", f"--dashboard-port={dashboard}"]
    start += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    _start(*start, f"--metrics-export-port={metrics}", environment=environment)
    return {**environment, "IDEAL_TEST_HEAD": f"127.0.0.1:{port}"}


def add_node(environment: dict[str, str], cpus: int) -> None:
    """Start another node, of the head that ``start_head`` gave this environment for."""
    agent, metrics = _free_ports(2)
    start = [f"--address={environment['IDEAL_TEST_HEAD']}", f"--num-cpus={cpus}"]
    start += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
    _start(*start, environment=environment)


def _start(*arguments: str, environment: dict[str, str]) -> None:
    command = [BIN / "ray", "start", *arguments, "--disable-usage-stats"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def _free_ports(count: int) -> list[int]:
    """Ray binds them seconds later: until then nobody else takes them but by a rare chance."""
    return list(islice(filter(_is_free, random.SystemRandom().sample(PORTS, len(PORTS))), count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
