"""``ideal sensitivity``: how the mixtures of a recorded run hang on its reference sets.

``ideal.analysis.sensitivity`` computes it from the products between blocks that each influence stage left. Nothing is
trained, and no Ray is started.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ideal.analysis.sensitivity import Scenario, Spread, Start, scenarios
from ideal.config.config import Config
from ideal.errors import BadInput
from service.cluster.precision import decided
from service.outcome import Iteration, Outcome
from service.reports.report import label
from service.runs import run as runs
from service.store.names import run_folder

DRAWS = 300
"""Random reference sets for each random scenario: an interval's ends are then known to a few percent of its width."""


@dataclass(frozen=True)
class Finding:
    """The scenarios of one iteration; ``m`` is the largest relative change its update was allowed."""

    name: str
    domains: list[str]
    m: float
    scenarios: list[Scenario]


def examine(config: Config, console: Console) -> Path:
    """Work out every scenario of a run, write them beside its report, and print them; returns the Markdown's path.

    Raises:
        BadInput: no influence of this run is recorded yet.
    """
    config = decided(config, lambda line: console.print(escape(line)))
    outcome = runs.replay(config, lambda line: console.print(escape(line)))
    found = findings(config, outcome)
    if not found:
        raise BadInput("sensitivity", "no influence of this run is recorded yet", "run it first")
    path = write(run_folder(config), config, found)
    for finding in found:
        console.print(table(finding, config.influence.confidence))
    console.print(f"Sensitivity: {path}", soft_wrap=True)
    return path


def findings(config: Config, outcome: Outcome) -> list[Finding]:
    """The scenarios of every accepted iteration that has an influence."""
    found = []
    for iteration in outcome.accepted:
        if iteration.table is None:
            continue
        domains = list(iteration.volumes)
        sizes = [outcome.data.result[domain] for domain in domains]
        m = step_size(config, outcome, iteration)
        start = Start(
            volumes=list(iteration.volumes.values()),
            pools=[each["pool"] for each in sizes],
            tokens_per_example=[each["tokens_per_example"] for each in sizes],
            m=m,
        )
        changes = scenarios(
            iteration.table,
            domains,
            start,
            config.equilibrium,
            draws=DRAWS,
            confidence=config.influence.confidence,
            seed=config.seed,
        )
        found.append(Finding(label(iteration), domains, m, changes))
    return found


def step_size(config: Config, outcome: Outcome, iteration: Iteration) -> float:
    """The m of the update that was taken from this iteration; of the first one tried, if none was."""
    for following in outcome.accepted:
        if following.number == iteration.number + 1 and following.m is not None:
            return following.m
    return iteration.m or config.equilibrium.m


def write(folder: Path, config: Config, found: list[Finding]) -> Path:
    """sensitivity.json, unrounded, and sensitivity.md into the run's folder; returns the latter's path."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {"confidence": config.influence.confidence, "iterations": [_json(finding) for finding in found]}
    (folder / "sensitivity.json").write_text(json.dumps(body, indent=1))
    path = folder / "sensitivity.md"
    path.write_text(_markdown(config, found))
    return path


def table(finding: Finding, confidence: float) -> Table:
    """One iteration for a terminal: how far each change of the reference set turns β, and where the volumes go."""
    title = f"{finding.name}: the next volumes, had the reference set been another ({confidence:.0%} intervals)"
    shown = Table("reference set", "cosine of β", "signs changed", *finding.domains, title=title, title_justify="left")
    for s in finding.scenarios:
        volumes = [_cell(s.volumes, s.draws, "{:.0f}", n) for n in range(len(finding.domains))]
        shown.add_row(s.name, _cell(s.cosine, s.draws, "{:.2f}"), _cell(s.flips, s.draws, "{:.1f}"), *volumes)
    return shown


def _markdown(config: Config, found: list[Finding]) -> str:
    lines = [f"# {config.name}: how sure is the mixture?", ""]
    lines += [
        "The update from the same influences with another reference set: its blocks drawn again, half of them, other "
        "weights of the capabilities in the objective, or one capability left out. *Cosine* compares β with the whole "
        "reference set's, *signs changed* counts the domains that would grow instead of shrink or the reverse. Random "
        f"changes show the mean and the {config.influence.confidence:.0%} interval of {DRAWS} draws.",
        "",
    ]
    for finding in found:
        lines += [f"## {finding.name}, m = {finding.m:g}", ""]
        heads = "".join(f" β {d} |" for d in finding.domains) + "".join(f" {d} (examples) |" for d in finding.domains)
        lines += [f"| reference set | cosine | signs changed |{heads}", "| --- |" + " ---: |" * (2 + heads.count("|"))]
        for s in finding.scenarios:
            domains = range(len(finding.domains))
            cells = [s.name, _cell(s.cosine, s.draws, "{:.3f}"), _cell(s.flips, s.draws, "{:.1f}")]
            cells += [_cell(s.beta, s.draws, "{:+.3f}", n) for n in domains]
            cells += [_cell(s.volumes, s.draws, "{:.0f}", n) for n in domains]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(spread: Spread, draws: int, form: str, domain: int | None = None) -> str:
    """+0.12, or +0.12 [-0.03, +0.20] of several draws."""
    ends = [spread.mean, spread.low, spread.high]
    mean, low, high = (form.format(float(x if domain is None else x[domain])) for x in ends)
    return mean if draws == 1 else f"{mean} [{low}, {high}]"


def _json(finding: Finding) -> dict[str, Any]:
    def spread(s: Spread) -> dict[str, Any]:
        return {end: np.asarray(value).tolist() for end, value in vars(s).items()}

    def plain(s: Scenario) -> dict[str, Any]:
        return {key: spread(value) if isinstance(value, Spread) else value for key, value in vars(s).items()}

    return {**vars(finding), "scenarios": [plain(s) for s in finding.scenarios]}
