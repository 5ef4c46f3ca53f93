"""What every command says in the same words: notices as they come, and at the end where the results are."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ideal.config.config import Config
from service.reports import handed_over
from service.store.remote import keep_report


def notices(console: Console) -> Callable[[str], None]:
    """How a store and a tracker tell a user something, a line at a time."""
    return lambda line: console.print(f"[yellow]![/] {escape(line)}")


def point_to(report: Path, config: Config, console: Console) -> None:
    """Say where a report is, and how to see the run in MLflow; where storage is a URL, copy the report there."""
    console.print(f"Report: {report}", soft_wrap=True)
    if trouble := keep_report(config, report.parent):
        notices(console)(trouble)
    console.print(f"MLflow: {mlflow_command(config)}", soft_wrap=True)


def mlflow_command(config: Config) -> str:
    """How to look at the run in MLflow."""
    uri = handed_over.shown(handed_over.uri_of(config))
    if uri.startswith("http"):
        return uri
    beside = Path(sys.executable).parent / "mlflow"
    program = beside if beside.exists() else shutil.which("mlflow") or "mlflow"
    return f"{program} ui --backend-store-uri {uri}"
