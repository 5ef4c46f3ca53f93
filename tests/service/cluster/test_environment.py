"""Starting the command loads little, and no connection to a hub is opened unless something of it is asked for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ideal.config.file import parse
from ideal.errors import BadInput
from service.cli import guarded
from service.cluster import environment
from tests.service.conftest import tree

CONFIGS = Path(__file__).resolve().parents[3] / "jobs" / "configs"
HEAVY = ("ray", "torch", "transformers", "pydantic", "numpy", "mlflow", "datasets", "vllm", "requests")

WATCHED = """
import sys
from service.cli import guarded

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print("CONNECTS", event, arguments[1:] if event == "socket.connect" else arguments[:2])

sys.addaudithook(watch)
status = guarded(sys.argv[1:])
print("LOADED", *sys.modules)
sys.exit(status)
"""

HELPS = """
import sys
from service.cli import app, guarded

for command in app.registered_commands:
    name = command.name or command.callback.__name__
    assert guarded([name, "--help"]) == 0, name
    print("HELPED", name)
print("LOADED", *sys.modules)
"""

LOADS = """
import sys
from pathlib import Path

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print("CONNECTS", event, arguments[-2:])
        raise OSError("no connection is allowed")

sys.addaudithook(refuse)
from service.cli import read

config, folder = read(Path(sys.argv[1]), None), Path(sys.argv[2])

import torch
from transformers import AutoConfig

from ideal.data.chat import ChatEncoder
from ideal.data.domains import prepare
from ideal.model.base import load_model, load_tokenizer, materialise
from ideal.training.trainer import example_losses

materialise(config.model, folder)
domains = prepare(config, ChatEncoder(load_tokenizer(folder), config.model.max_tokens), [])
model = load_model(folder, torch.float32)
for domain in domains:
    losses, _ = example_losses(model, domain.reference, torch.device("cpu"), 256)
    print("READ", domain.name, len(domain.train), len(losses))
try:
    AutoConfig.from_pretrained("org/model")
except OSError:
    print("A hub's model is none here.")
"""


def watched(*arguments: str, program: str = WATCHED) -> subprocess.CompletedProcess[str]:
    """The command in a process that says which connections it opens and what it has loaded at its end."""
    unset = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "RAY_ADDRESS")
    plain = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=plain | {"COLUMNS": "200"}
    )


def loaded(ended: subprocess.CompletedProcess[str]) -> set[str]:
    """The packages that a process had loaded at its end."""
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return {name.partition(".")[0] for name in ended.stdout.partition("LOADED")[2].split()}


def test_help_loads_nothing_heavy() -> None:
    ended = watched("--help")
    assert "typer" in loaded(ended)
    assert not loaded(ended) & set(HEAVY)
    assert "CONNECTS" not in ended.stdout


def test_the_help_of_each_command_loads_nothing_heavy() -> None:
    ended = watched(program=HELPS)
    assert loaded(ended) & set(HEAVY) <= {"pydantic"}, "which typer reads options with"
    assert {"run", "config", "sweep", "doctor"} <= set(re.findall(r"^HELPED (\w+)$", ended.stdout, re.MULTILINE))


@pytest.mark.parametrize("arguments", [(str(CONFIGS / "your-data.yaml"),), ("--schema",)], ids=["values", "schema"])
def test_showing_a_config_loads_only_what_reads_it(arguments: tuple[str, ...]) -> None:
    """Nor is a hub looked for, though the config names one."""
    ended = watched("config", *arguments)
    assert loaded(ended) & set(HEAVY) == {"pydantic"}
    assert "CONNECTS" not in ended.stdout


def test_a_run_that_asks_for_no_hub_connects_to_nothing(tmp_path: Path) -> None:
    """Nor do the libraries under it: transformers asks a hub about any model's tokenizer if it may."""
    ended = watched("run", "--dry-run", str(CONFIGS / "quickstart.yaml"), "--set", f"storage={tmp_path / 'store'}")
    assert "Ready to run." in ended.stdout, ended.stderr
    assert "CONNECTS" not in ended.stdout


def test_local_files_and_a_local_model_are_loaded_without_a_connection(tmp_path: Path, tiny_model: Path) -> None:
    """Nor would the libraries open one for something else: they are offline."""

    def rows(name: str, count: int) -> list[dict[str, str]]:
        return [{"prompt": f"What is {name} + {n}?", "completion": str(n)} for n in range(count)]

    domains = []
    for name in ("math", "chat"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows(name, 9))))
        pq.write_table(pa.Table.from_pylist(rows(f"{name} again", 8)), tmp_path / f"{name}.parquet")
        train, reference = ({"files": [f"{name}.{kind}"]} for kind in ("jsonl", "parquet"))
        domains.append({"name": name, "train": train, "reference": reference})
    template = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template + "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}")
    model = {"source": str(tiny_model), "chat_template": "chat.jinja"}
    settings: dict[str, Any] = {**tree(tmp_path / "store"), "model": model, "domains": domains}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "model").mkdir()
    ended = watched(str(tmp_path / "config.yaml"), str(tmp_path / "model"), program=LOADS)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["READ math 9 8", "READ chat 9 8", "A hub's model is none here."]


class Server:
    """A hub, or a proxy, that answers; which is all that it can do."""

    def __init__(self) -> None:
        asked = self.asked = []  # type: ignore[var-annotated]

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                asked.append((self.command, self.path))
                self.send_response(200)
                self.end_headers()

            do_HEAD = do_GET = do_CONNECT = answer  # noqa: N815

            def log_message(self, *said: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No hub and no proxy is set, in either spelling; what a test sets is put back."""
    for name in ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # put back afterwards, whatever is set meanwhile
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return monkeypatch


def test_a_hub_that_is_asked_for_and_answers_may_be_used(variables: pytest.MonkeyPatch, server: Server) -> None:
    variables.setenv("HF_ENDPOINT", server.url)
    environment.reach_hub(True)
    assert "HF_HUB_OFFLINE" not in os.environ
    assert server.asked == [("HEAD", "/")]


def test_a_hub_that_does_not_answer_is_given_up(variables: pytest.MonkeyPatch, server: Server) -> None:
    server.close()
    variables.setenv("HF_ENDPOINT", server.url)
    environment.reach_hub(True)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_hub_that_is_not_asked_for_is_not_looked_at(variables: pytest.MonkeyPatch, server: Server) -> None:
    variables.setenv("HF_ENDPOINT", server.url)
    environment.reach_hub(False)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not server.asked


def test_a_users_own_setting_wins(variables: pytest.MonkeyPatch, server: Server) -> None:
    variables.setenv("HF_ENDPOINT", server.url)
    variables.setenv("HF_HUB_OFFLINE", "0")
    environment.reach_hub(False)
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_a_hub_is_reached_through_a_proxy(variables: pytest.MonkeyPatch, server: Server) -> None:
    """Where only a proxy leads out, a connection of one's own would fail though the hub's client succeeds."""
    variables.setenv("HF_ENDPOINT", "https://hub.invalid")
    variables.setenv("HTTPS_PROXY", server.url)
    assert environment.hub_answers()
    assert server.asked == [("CONNECT", "hub.invalid:443")]


@pytest.mark.parametrize(
    ("change", "asks"),
    [
        ({}, False),
        ({"model": {"source": "smollm2"}}, False),
        ({"model": {"source": "org/model"}}, True),
        ({"model": {"source": "/a/folder"}}, False),
        ({"model": {"source": "made", "made": {"corpus": [{"files": ["a.jsonl"]}]}}}, False),
        ({"model": {"source": "made", "made": {"corpus": [{"hub": "org/data"}]}}}, True),
        ({"benchmarks": [{"name": "x", "task": "gsm8k"}]}, True),
        ({"benchmarks": [{"name": "x", "task": "mine", "include": "tasks"}]}, False),
        ({"benchmarks": [{"name": "x", "task": "theirs", "include": "tasks"}]}, True),
        ({"benchmarks": [{"name": "x", "task": "gsm8k", "include": "tasks"}]}, True),
    ],
)
def test_what_asks_for_a_hub(tmp_path: Path, change: dict[str, Any], asks: bool) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text("task: mine\ndataset_path: json\nprocess: !function x.y\n")
    (tmp_path / "tasks" / "theirs.yaml").write_text("task: theirs\ndataset_path: org/data\n")
    assert environment.asks_hub(parse({**tree(tmp_path), **change}, "test", tmp_path)) is asks


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["sweep", "--param", "methods.domain=math,chat"], False),
        (["sweep", "--param", "model.source=smollm2,org/model"], True),
        (["compare", "--also", "equilibrium.m=0.5"], False),
        (["compare", "--also", "domains.math.train.hub=org/data"], True),
        (["plan", "--model", "org/model"], True),
        (["plan", "--model", __file__], False),
        (["submit"], False),
    ],
)
def test_what_a_command_changes_may_ask_for_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], asked: bool
) -> None:
    """The config as it lies there needn't hold: a sweep may give it what it lacks."""
    heard: list[bool] = []

    def reach_hub(wanted: bool) -> None:
        heard.append(wanted)
        raise BadInput("test", "nothing runs")

    monkeypatch.setattr(environment, "reach_hub", reach_hub)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path)))
    lacking = ["--set", "method=specific"] if "methods.domain" in arguments[-1] else []
    assert guarded([arguments[0], str(path), *arguments[1:], *lacking]) == 2
    assert heard == [asked]


def test_a_domain_on_a_hub_asks_for_it(tmp_path: Path) -> None:
    settings: Any = tree(tmp_path)
    settings["domains"][0]["reference"] = {"hub": "org/data"}
    assert environment.asks_hub(parse(settings, "test", tmp_path))
