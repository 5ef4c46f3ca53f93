"""Bad input is one error that names the field, before anything has started; ``--dry-run`` starts nothing."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ideal.config.config import Config
from ideal.config.file import load
from service.cli import guarded
from service.errors import StageFailed
from tests.service.conftest import tree
from tests.tiny import make_model

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray may be up for other tests: what counts is that no one asks for it."""

    def started(*arguments: object, **options: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr("ray.init", started)
    monkeypatch.setattr("ray.is_initialized", lambda: False)


class Console:
    """The command line of one test: its config, what it printed, and where it would store."""

    def __init__(self, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.tree: Tree = {**tree(folder / "store"), "model": {"source": str(model), "max_tokens": 400}}
        rows = [{"prompt": f"What is {n} + 1?", "completion": str(n + 1)} for n in range(20)]
        for name in ("train", "reference"):
            (folder / f"{name}.jsonl").write_text(
                "\n".join(map(json.dumps, rows[:12] if name == "reference" else rows))
            )

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, output and errors of ``ideal run``."""
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.tree))
        status = guarded(["run", str(path), *arguments])
        out, err = self.capsys.readouterr()
        return status, out, err

    @property
    def recorded(self) -> list[Path]:
        return list((self.folder / "store").rglob("stage.json"))


@pytest.fixture
def ideal(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> Console:
    return Console(tmp_path, model, capsys)


def math_of(tree: Tree) -> Tree:
    return tree["domains"][0]


def missing_file(tree: Tree) -> None:
    math_of(tree)["train"] = {"files": ["not-there.jsonl"]}


def few_rows(tree: Tree) -> None:
    math_of(tree)["train"] = {"files": ["train.jsonl"]}
    math_of(tree)["volume"] = 21


def few_generated(tree: Tree) -> None:
    math_of(tree)["volume"] = 25


BAD: dict[str, tuple[Callable[[Tree], object], list[str]]] = {
    "mistyped key": (lambda t: t.update(sft={"lerning_rate": 1}), ["sft.lerning_rate", "did you mean `learning_rate`"]),
    "missing section": (lambda t: t.pop("domains"), ["domains"]),
    "missing file": (missing_file, ["domains.math.train.files", "not-there.jsonl"]),
    "unknown benchmark": (
        lambda t: t["benchmarks"][0].update(reasoning_gym="chain_sun"),
        ["benchmarks.sums", "chain_sum"],
    ),
    "m of 1": (lambda t: t.update(equilibrium={"m": 1.0}), ["equilibrium.m", "less than 1"]),
    "m of 0": (lambda t: t.update(equilibrium={"m": 0}), ["equilibrium.m", "greater than 0"]),
    "no model there": (lambda t: t["model"].update(source="/not/there"), ["model.source", "/not/there"]),
    "no model in it": (lambda t: t["model"].update(source="."), ["model.source", "config.json"]),
    "no template": (lambda t: t["model"].update(chat_template="no.jinja"), ["model.chat_template", "no.jinja"]),
    "fewer rows": (few_rows, ["domains.math.volume", "21", "20 rows"]),
    "fewer items": (few_generated, ["domains.math.volume", "25", "24"]),
    "unknown task": (lambda t: math_of(t)["train"].update(reasoning_gym="chain_sun"), ["domains.math.train"]),
    "shared seeds": (lambda t: math_of(t)["reference"].update(seed=5), ["domains.math.reference", "seed"]),
    "too many GPUs": (lambda t: t.update(resources={"gpus": 99}), ["resources.gpus", "99"]),
    "too many workers": (lambda t: t.update(resources={"sft_workers": 9999}), ["resources.sft_workers", "9999"]),
    "code not allowed": (
        lambda t: t.update(benchmarks=[{"name": "code", "task": "humaneval"}]),
        ["benchmarks.code", "allow_code_execution"],
    ),
}
ELSEWHERE = {"too many GPUs"}  # a dry run lists what another machine may have


@pytest.mark.parametrize("what", BAD)
@pytest.mark.usefixtures("nothing_starts")
def test_bad_input_is_one_error_before_anything_starts(ideal: Console, what: str) -> None:
    change, words = BAD[what]
    change(ideal.tree)
    for arguments in ([], ["--dry-run"]):
        if arguments and what in ELSEWHERE:
            continue
        status, _, errors = ideal(*arguments)
        text = " ".join(errors.split())
        assert status == 2, errors
        assert text.count("error ") == 1
        assert "Traceback" not in errors
        assert all(word in text for word in words), text
        assert not ideal.recorded


@pytest.mark.usefixtures("nothing_starts")
def test_all_mistakes_of_a_config_are_named_at_once(ideal: Console) -> None:
    ideal.tree |= {"sft": {"epochs": -1}, "equilibrium": {"m": 2}, "nmae": "x"}
    status, _, errors = ideal()
    assert status == 2
    assert all(word in errors for word in ("sft.epochs", "equilibrium.m", "did you mean `name`"))


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, ["can't be read"]), ("a: [", ["not YAML"]), ("", ["holds no settings"]), ("- 1", ["holds no settings"])],
)
def test_a_config_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, words: list[str]
) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    assert guarded(["run", str(path)]) == 2
    errors = capsys.readouterr().err
    assert all(word in " ".join(errors.split()) for word in words)
    assert "config.yaml" in errors.replace("\n", "")


@pytest.mark.parametrize(
    ("override", "status"),
    [("sft.epochs=2", 0), ("domains.math.volume=3", 0), ("sft.epochs", 2), ("a.b=1", 2), ("domains.art.volume=3", 2)],
)
@pytest.mark.usefixtures("nothing_starts")
def test_overrides_name_a_field(ideal: Console, override: str, status: int) -> None:
    found, out, errors = ideal("--dry-run", "--set", override)
    assert found == status
    assert "Ready to run." in out if status == 0 else "error" in errors
    if override == "domains.math.volume=3":
        assert "math: 3 of" in out


@pytest.mark.usefixtures("nothing_starts")
def test_a_dry_run_prints_the_plan_and_leaves_nothing(ideal: Console) -> None:
    math_of(ideal.tree)["train"] = {"files": ["train.jsonl"]}
    status, out, _ = ideal("--dry-run")
    assert status == 0
    assert "math: 12 of 20 examples" in out
    assert "memory: SFT" in out
    assert re.search(r"1 node, \d+ CPUs, \d+ GPUs,\s+(bf16|fp32) \(", out)
    assert "D2: SFT" in out
    assert not (ideal.folder / "store").exists()


@pytest.mark.usefixtures("nothing_starts")
def test_a_dry_run_lists_the_gpus_that_are_not_here(ideal: Console) -> None:
    status, out, _ = ideal("--dry-run", "--set", "resources.gpus=99")
    assert status == 0
    assert "not here" in out
    assert "99 GPUs" in out
    assert "Ready to run" not in out


SHIPPED = sorted(path.name for path in CONFIGS.glob("*.yaml"))


def test_there_are_configs_to_check() -> None:
    assert {"quickstart.yaml", "your-data.yaml"} < set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.usefixtures("nothing_starts")
def test_shipped_configs_can_be_checked_anywhere(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = guarded(["run", str(CONFIGS / name), "--dry-run", "--set", f"storage={tmp_path}"])
    out, errors = capsys.readouterr()
    if name == "your-data.yaml":
        assert status == 2
        assert "data/math.jsonl" in errors.replace("\n", "")
    else:
        assert status == 0, errors
        assert "D2: SFT" in out
    assert not list(tmp_path.rglob("stage.json"))


@pytest.mark.usefixtures("nothing_starts")
def test_a_dry_run_of_a_model_that_is_made_knows_its_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ("--set", f"storage={tmp_path}", "--set", "method=doge")
    assert guarded(["run", str(CONFIGS / "study.yaml"), "--dry-run", *overrides]) == 0
    out = capsys.readouterr().out
    for line in ("the run makes it", "✓ memory: SFT 0.", "doge: its mixture → SFT", "Ready to run."):
        assert line in out
    assert "D1: SFT" not in out


@pytest.mark.usefixtures("nothing_starts")
def test_a_dry_run_counts_what_benchmarks_ask_too(ideal: Console) -> None:
    """Else a run would find out after its base model: a small space of questions leaves few that aren't held out."""
    few = {"reasoning_gym": "gcd", "options": {"min_value": 1, "max_value": 4}}
    math_of(ideal.tree)["train"] = {**few, "size": 24, "seed": 0}
    ideal.tree["benchmarks"] = [{"name": "divisors", **few, "size": 40, "seed": 4000}]
    status, _, errors = ideal("--dry-run")
    assert status == 2
    assert "asks for 12 examples" in errors
    assert "also held out" in errors
    ideal.tree["benchmarks"] = [{"name": "divisors", **few, "size": 1, "seed": 4000}]
    status, out, _ = ideal("--dry-run")
    assert status == 0
    assert "0 rows rejected, " in out


def test_a_config_that_is_shown_can_be_read_again(ideal: Console) -> None:
    ideal.tree["domains"][0]["train"] = {"files": ["train.jsonl"]}
    path, printed = ideal.folder / "config.yaml", ideal.folder / "store" / "printed.yaml"
    path.write_text(yaml.safe_dump(ideal.tree))
    assert guarded(["config", str(path), "--set", "seed=7"]) == 0
    printed.parent.mkdir()
    printed.write_text(ideal.capsys.readouterr().out)
    assert load(printed) == load(path, ["seed=7"])


def test_no_config_to_show_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(["config"]) == 2
    assert "no file is named" in capsys.readouterr().err


def test_the_template_names_fields_that_exist() -> None:
    """Its files are the user's, its fields are ours."""
    assert load(CONFIGS / "your-data.yaml").name == "my-mixture"


def test_doctor_says_what_this_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("Python 3", "torch", "CPUs", "GiB of memory free", "MLflow", "products in bf16", "GFLOP/s a core"):
        assert word in out


def test_doctor_fails_where_a_package_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.runs.doctor.PACKAGES", ("no-such-package",))
    assert guarded(["doctor"]) == 1
    assert "no-such-package is not installed" in capsys.readouterr().out


def test_nothing_to_sync_is_bad_input(ideal: Console) -> None:
    path = ideal.folder / "config.yaml"
    path.write_text(yaml.safe_dump(ideal.tree))
    assert guarded(["sync", str(path)]) == 2
    assert "nothing of this run is recorded" in ideal.capsys.readouterr().err


@pytest.mark.usefixtures("nothing_starts")
def test_the_sensitivity_of_a_run_that_has_not_happened_is_bad_input(ideal: Console) -> None:
    path = ideal.folder / "config.yaml"
    path.write_text(yaml.safe_dump(ideal.tree))
    assert guarded(["sensitivity", str(path), "--set", "equilibrium.m=0.3"]) == 2
    errors = ideal.capsys.readouterr().err
    assert "no influence of this run is recorded" in errors
    assert "run it first" in errors
    assert not list((ideal.folder / "store").glob("runs/*"))


@pytest.mark.parametrize(
    ("failure", "status", "word"),
    [
        (StageFailed("D0 SFT failed: [x]"), 1, "D0 SFT failed: [x]"),
        (KeyboardInterrupt(), 130, "same command"),
        (OSError(errno.ENOSPC, "No space left on device", "/s/report.md"), 2, "/s/report.md: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "/s/report.md"), 2, "same command"),
    ],
)
def test_failures_have_a_status_of_their_own(
    ideal: Console, monkeypatch: pytest.MonkeyPatch, failure: BaseException, status: int, word: str
) -> None:
    def fails(config: Config, console: object) -> None:
        raise failure

    monkeypatch.setattr("service.runs.run.run", fails)
    found, _, errors = ideal()
    assert found == status
    assert word in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("arguments", [["frobnicate"], ["run"], ["run", "a.yaml", "--no-such-option"]])
def test_a_command_that_is_none_is_bad_input(arguments: list[str]) -> None:
    assert guarded(arguments) == 2
