"""What a fidelity study found, as tables, a scatter plot and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from ideal.analysis.fidelity import (
    agreement,
    attainable,
    coverage,
    own_loss,
    predicted,
    right_signs,
    slope,
    widening,
)
from ideal.config.config import Config
from ideal.equilibrium import DILUTION
from ideal.influence.table import Array
from service.outcome import Findings

FORMS = ("centred", "one dilution", "by tokens", "uncentred")
"""How influence is counted: as the update does, above the mixture's with AdamW's dilution of each domain; with one
dilution for all; with that of a plain mean, 1; or as it is."""
TRIVIAL = "own set's loss, no gradient"

COLUMNS = ["pearson", "off diagonal", "within sets", "single", "spearman", "slope"]
SCOPES: dict[str, Callable[[Array], Array]] = {
    "matrix": np.asarray,
    "macro": lambda values: np.asarray(values.mean(-1)),
}
"""All M × R entries, and their mean over reference sets."""


def summary(findings: Findings, config: Config) -> dict[str, Any]:
    """Every number of the study, JSON-like: mode → scope → what is attainable and an entry for each predictor."""
    found: dict[str, Any] = {
        "domains": findings.domains,
        "volumes": findings.volumes,
        "seeds": config.fidelity.seeds,
        "change": config.fidelity.change,
        "seconds": findings.seconds,
        "reference_loss": findings.base.mean(0).tolist(),
        "modes": {},
    }
    for mode, actual in findings.actual.items():
        scopes: dict[str, Any] = {}
        for scope, of in SCOPES.items():
            truth = of(actual)
            tried = {TRIVIAL: of(by_own_loss(findings, mode))}
            for solver in findings.tables:
                for form in FORMS:
                    tried[f"{solver}, {form}"] = of(predictions(findings, solver, mode, form))
            scopes[scope] = {
                "entries": int(truth[0].size),
                "decided": right_signs(truth, truth)[1],
                "attainable": {
                    name: {"halves": h, "value": v} for name, (h, v) in attainable(truth, config.seed).items()
                },
                "solvers": {name: _measured(prediction, truth) for name, prediction in tried.items()},
            }
        found["modes"][mode] = {
            **scopes,
            "actual": actual.mean(0).tolist(),
            "standard_error": (actual.std(0, ddof=1) / np.sqrt(len(actual))).tolist(),
            "predicted": {solver: predictions(findings, solver, mode).mean(0).tolist() for solver in findings.tables},
            "coverage": {solver: covered(findings, solver, mode, config) for solver in findings.tables},
        }
    return found


def predictions(findings: Findings, solver: str, mode: str, form: str = FORMS[0]) -> Array:
    """[S, M, R] predicted dQ_r/dβ_j."""
    influence = np.array([table.matrix() for table in findings.tables[solver]])
    crowding = np.array([table.crowding for table in findings.tables[solver]]) * (form == "centred")
    dilution = {"by tokens": 1.0, "uncentred": None}.get(form, DILUTION)
    return predicted(influence, crowding, findings.volumes, findings.tokens, mode, dilution)


def by_own_loss(findings: Findings, mode: str) -> Array:
    """[S, M, R] the same by the trivial rule, from each seed's reference losses alone."""
    rule = own_loss(findings.base)
    return predicted(rule, np.zeros_like(rule), findings.volumes, findings.tokens, mode, DILUTION)


def _measured(prediction: Array, truth: Array) -> dict[str, Any]:
    right, of = right_signs(prediction, truth)
    measures = {name: asdict(measure) for name, measure in agreement(prediction, truth).items()}
    return {**measures, "signs": {"value": right / of if of else float("nan"), "right": right, "of": of}}


def covered(findings: Findings, solver: str, mode: str, config: Config) -> dict[str, float]:
    """How often a seed's interval holds the value it stands for.

    `actual`: the retrainings' mean, at the slope that fits all entries best. `own`: the mean prediction of all seeds,
    which is what the interval would hold if sampling were its only error. `widening`: by what factor the bootstrap's
    intervals must grow to hold the actual value as often as they say; `widened`: how often they do, each seed's grown
    by the other seeds' factor.
    """
    settings = config.influence
    tail = (1 - settings.confidence) / 2
    bounds: dict[float, list[Array]] = {1.0: [], settings.widening: []}
    for table in findings.tables[solver]:
        for factor, found in bounds.items():
            cloud = table.resampled(settings.resamples, config.seed, factor)
            moves = predicted(cloud, table.crowding, findings.volumes, findings.tokens, mode, DILUTION)
            found.append(np.quantile(moves, [tail, 1 - tail], axis=0))
    low, high = np.array(bounds[settings.widening]).transpose(1, 0, 2, 3)
    narrow = np.array(bounds[1.0]).transpose(1, 0, 2, 3)
    values, actual = predictions(findings, solver, mode), findings.actual[mode].mean(0)
    truth = actual / slope(values.mean(0), actual)
    factor, held = widening(narrow[0], values, narrow[1], truth, settings.confidence)
    return {
        "actual": coverage(low, high, truth),
        "own": coverage(low, high, values.mean(0)),
        "widening": factor,
        "widened": held,
    }


def tables(found: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(heading, columns, rows) for each mode and scope."""
    shown = []
    for mode, scopes in found["modes"].items():
        for scope in SCOPES:
            measured = scopes[scope]
            heading = (
                f"fixed {mode}, {'every domain on every reference set' if scope == 'matrix' else 'their mean'}: "
                f"{measured['decided']} of {measured['entries']} signs decided"
            )
            columns = [c for c in COLUMNS if c in measured["solvers"][TRIVIAL]]
            rows = [
                [name, *(_number(measured["attainable"].get(c, {}).get(key)) for c in columns), "", ""]
                for name, key in (("half the seeds by the other half", "halves"), ("a perfect predictor", "value"))
            ]
            for name, values in measured["solvers"].items():
                seconds = found["seconds"].get(name.partition(",")[0])
                signs = f"{values['signs']['right']} of {values['signs']['of']}"
                rows.append([name, *(_cell(values[c]) for c in columns), signs, _number(seconds, ".0f")])
            shown.append((heading, ["predictor", *columns, "signs", "seconds"], rows))
    return shown


def rich_tables(found: dict[str, Any]) -> list[Table]:
    """For a terminal."""
    made = []
    for heading, columns, rows in tables(found):
        table = Table(*columns, title=heading, title_justify="left")
        for row in rows:
            table.add_row(*row)
        made.append(table)
    return made


def scatter(findings: Findings, found: dict[str, Any], config: Config) -> Figure:
    """Predicted against actual change: a row for each mode, a column for each solver, a colour for each domain."""
    modes, solvers = list(findings.actual), list(findings.tables)
    size = (3.1 * len(solvers), 3.1 * len(modes))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(modes), len(solvers), squeeze=False)
    for row, mode in zip(grid, modes, strict=True):
        actual = findings.actual[mode].mean(0)
        for axes, solver in zip(row, solvers, strict=True):
            prediction = predictions(findings, solver, mode).mean(0)
            for j, domain in enumerate(findings.domains):
                axes.scatter(prediction[j], actual[j], s=14, label=domain)
            fit = slope(prediction, actual)
            ends = np.array([prediction.min(), prediction.max()])
            axes.plot(ends, fit * ends, color="grey", linewidth=0.8)
            r = found["modes"][mode]["matrix"]["solvers"][f"{solver}, centred"]["pearson"]["value"]
            axes.set_title(f"{solver}, fixed {mode}: r = {r:.2f}", fontsize=9)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
    figure.supxlabel("predicted dQ/dβ", fontsize=9)
    figure.supylabel("actual dQ/dβ (nats per token)", fontsize=9)
    grid[0][-1].legend(fontsize=6)
    return figure


def write(folder: Path, findings: Findings, config: Config) -> dict[str, Any]:
    """fidelity.md, fidelity.json and fidelity.png into ``folder``; returns what is in the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    found = summary(findings, config)
    (folder / "fidelity.json").write_text(json.dumps(found, indent=1))
    figure = scatter(findings, found, config)
    figure.savefig(folder / "fidelity.png", dpi=110)
    (folder / "fidelity.md").write_text(markdown(found, config))
    return found


def markdown(found: dict[str, Any], config: Config) -> str:
    """The study as a page."""
    lines = [
        f"# {config.name}: how far influence predicts retraining",
        "",
        f"{found['seeds']} seeds; every volume moved by ±{found['change']:.0%}. In brackets: 90 % intervals by leaving "
        "out seeds (jackknife). *Off diagonal*: of domains on others' sets. *Within sets*: mean over sets of the "
        "correlation over domains. *Single*: of one seed's prediction, which is what a run has. *Signs*: right ones of "
        "those that the retrainings decide. *A perfect predictor* reaches √(2h/(1+h)), where halves of the seeds agree "
        "by h. *Own set's loss*: each domain helps its own set alone, in proportion to that set's loss.",
        "",
        f"`centred`: above the mixture's mean as AdamW dilutes it ({DILUTION:g}), more by noisier domains; `one "
        "dilution`: the same by all domains; `by tokens`: as a plain mean over tokens does (1).",
        "",
    ]
    for heading, columns, rows in tables(found):
        lines += [f"## {heading}", "", "| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    lines += [
        f"## How often a {config.influence.confidence:.0%} interval holds",
        "",
        f"At `influence.widening` {config.influence.widening:g}. Beside it, the widening with which the bootstrap's "
        "own intervals hold the actual change as often as they say, and how often with that of the other seeds.",
        "",
        "| solver | mode | the actual change | the mean prediction | widening | then |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for mode, scopes in found["modes"].items():
        for solver, shares in scopes["coverage"].items():
            cells = [solver, f"fixed {mode}", f"{shares['actual']:.0%}", f"{shares['own']:.0%}"]
            cells += [f"{shares['widening']:.1f}", f"{shares['widened']:.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"One training took {found['seconds']['training']:.0f} s.",
        "",
        "![predicted against actual](fidelity.png)",
    ]
    return "\n".join(lines) + "\n"


def metrics(found: dict[str, Any]) -> dict[str, float]:
    """The study's figures by name, as MLflow takes them: measure/mode/scope/solver."""
    return {
        f"{name.replace(' ', '-')}/{mode}/{scope}/{_metric(solver)}": measure["value"]
        for mode, scopes in found["modes"].items()
        for scope in SCOPES
        for solver, measures in scopes[scope]["solvers"].items()
        for name, measure in measures.items()
        if np.isfinite(measure["value"])
    }


def _metric(predictor: str) -> str:
    """A predictor's name in the characters that MLflow takes."""
    return predictor.replace(", ", "-").replace(" ", "-").replace("'", "")


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else f"{value:{form}}"


def _cell(measure: dict[str, float]) -> str:
    return f"{measure['value']:.2f} [{measure['low']:.2f}, {measure['high']:.2f}]"
