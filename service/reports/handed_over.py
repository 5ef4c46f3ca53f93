"""What MLflow was given of a finished run, noted beside its report: a run with nothing new doesn't ask it.

Loading MLflow's client and asking it takes seconds. What is noted is a checksum, so that no address of a server, with
what may stand in it, is copied to where reports go. ``ideal sync`` asks whatever is noted.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import urlparse

from ideal.config.config import Config
from ideal.config.roots import ROOTS
from ideal.errors import BadInput

NOTE = "mlflow.sha256"
CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def uri_of(config: Config) -> str:
    """The tracking server: the config's, the environment's, or an SQLite file in the storage folder."""
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{config.root / 'mlflow.db'}"


def shown(uri: str) -> str:
    """A server's address without the password that may stand in it, for messages."""
    return re.sub(r"(?<=://)[^/@]*@", "", uri)


def check_server(config: Config) -> None:
    """Check that a config's own server isn't given the password that the environment has for another one.

    Raises:
        BadInput: it would be: whoever writes a config could read it there.
    """
    if not any(os.environ.get(name) for name in CREDENTIALS):
        return
    wanted, named = urlparse(config.tracking.uri or ""), urlparse(os.environ.get("MLFLOW_TRACKING_URI", ""))
    theirs = wanted.scheme in ("http", "https") and (wanted.scheme, wanted.netloc) != (named.scheme, named.netloc)
    if theirs and (named.netloc or ROOTS in os.environ):
        raise BadInput(
            "tracking.uri",
            f"{shown(wanted.geturl())} would be given the password of {shown(named.geturl()) or 'another server'}",
            "leave it out, or set MLFLOW_TRACKING_URI to the server that MLFLOW_TRACKING_PASSWORD is for",
        )


def has_all(config: Config, report: Path) -> bool:
    """Whether MLflow was given all that a finished run's report shows, by an earlier start of it."""
    note, database = report.with_name(NOTE), uri_of(config).partition("sqlite:///")[2]
    if not note.exists() or (database and not Path(database).exists()):
        return False
    return note.read_text() == _checksum(config, report)


def note(config: Config, report: Path) -> None:
    """Note that it was."""
    report.with_name(NOTE).write_text(_checksum(config, report))


def _checksum(config: Config, report: Path) -> str:
    place = f"{uri_of(config)} {config.tracking.experiment} {report.parent.name} "
    return hashlib.sha256(place.encode() + report.with_suffix(".json").read_bytes()).hexdigest()
