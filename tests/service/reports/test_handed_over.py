"""MLflow is asked where something of a run may be missing, and else not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ideal.config.config import Config
from ideal.errors import BadInput
from service.outcome import Outcome
from service.reports import handed_over, report
from service.reports.tracking import Tracker


@pytest.fixture
def written(config: Config, outcome: Outcome) -> Path:
    """A finished run's report, and the database that was given all of it."""
    path = report.write(config.root / "runs" / "tiny", config, outcome)
    (config.root / "mlflow.db").touch()
    assert not handed_over.has_all(config, path)
    handed_over.note(config, path)
    return path


def test_what_was_given_is_not_given_again(config: Config, written: Path) -> None:
    assert handed_over.has_all(config, written)


def test_another_report_server_or_experiment_or_a_lost_database_is(
    config: Config, written: Path, outcome: Outcome
) -> None:
    for update in ({"uri": "http://elsewhere"}, {"experiment": "other"}):
        other = config.model_copy(update={"tracking": config.tracking.model_copy(update=update)})
        assert not handed_over.has_all(other, written)
    outcome.iterations[0].loss = 9.0
    report.write(written.parent, config, outcome)
    assert not handed_over.has_all(config, written)
    handed_over.note(config, written)
    (config.root / "mlflow.db").unlink()
    assert not handed_over.has_all(config, written)


def test_no_address_is_written_down(config: Config, written: Path) -> None:
    secret = config.tracking.model_copy(update={"uri": "http://user:secret@server"})
    handed_over.note(config.model_copy(update={"tracking": secret}), written)
    assert "secret" not in (written.parent / handed_over.NOTE).read_text()


OURS, THEIRS = "https://mlflow.ours", "https://mlflow.theirs"


@pytest.mark.parametrize(
    ("wanted", "named", "roots", "refused"),
    [
        (THEIRS, OURS, None, True),
        (f"{OURS}:81", OURS, None, True),
        ("http://mlflow.ours", OURS, None, True),
        (THEIRS, None, "/data", True),
        (OURS, OURS, "/data", False),
        (f"{OURS}/", OURS, None, False),
        (THEIRS, None, None, False),
        (None, OURS, "/data", False),
        ("sqlite:///runs.db", OURS, None, False),
    ],
)
def test_a_configs_own_server_is_given_no_other_servers_password(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str | None,
    named: str | None,
    roots: str | None,
    refused: bool,
) -> None:
    for name, value in (("MLFLOW_TRACKING_URI", named), ("IDEAL_ROOTS", roots)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    asked = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": wanted})})
    handed_over.check_server(asked)  # without a password there is nothing to lose
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    if refused:
        with pytest.raises(BadInput, match="would be given the password"):
            Tracker(asked, "run", config.root, print)
    else:
        handed_over.check_server(asked)


@pytest.mark.parametrize(
    "uri", ["http://admin:secret@host:5000/x", "postgresql://me:secret@host/db", "http://host/a@b"]
)
def test_no_password_is_shown(uri: str, config: Config, outcome: Outcome) -> None:
    assert "secret" not in handed_over.shown(uri)
    assert handed_over.shown(uri).endswith(uri.rpartition("secret@")[2])
    said: list[str] = []
    unreachable = config.tracking.model_copy(update={"uri": "http://admin:secret@127.0.0.1:9/"})
    assert not Tracker(config.model_copy(update={"tracking": unreachable}), "run", config.root, said.append).write(
        outcome
    )
    assert "127.0.0.1:9" in said[0]
    assert "secret" not in said[0]
