"""What a comparison of methods found: the paper's kind of table, plots, CSV and JSON.

Rows are methods, columns benchmarks; means over seeds, with intervals over seeds and items, and paired differences: of
every method to Joint SFT, and of this project's own to every other.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ideal.analysis.comparison import Array, Tables, difference, estimate, holm
from ideal.costs import PASSES
from service.outcome import Outcome, Trial, Trials, sweep_key
from service.reports import report
from service.reports.console import notices, point_to
from service.reports.tracking import Tracker
from service.stages.benchmark import by_item
from service.store.stage import Record

CONFIDENCE = 0.95
"""Level of the intervals."""


Runs = dict[str, list[dict[str, Any]]]
"""By row, what its runs gave, seed by seed."""


def present(findings: Trials, console: Console, *, base: str, ours: str) -> dict[str, Any]:
    """Show a comparison, and leave it as files and in MLflow; returns all its numbers."""
    config, key = findings.trials[0].config, sweep_key(findings.trials)
    found = summary(findings, base, ours)
    folder = config.root / "comparisons" / f"{config.name}-{key}"
    path = write(folder, found)
    tracker = Tracker(config, f"comparison-{key}", folder, notices(console), name=f"{config.name} comparison")
    tracker.write_study(metrics(found))
    console.print(table(found, console.width))
    if found["duels"]:
        console.print(_shown(*_duels(found)))
    for line in legend(found):
        console.print(line, soft_wrap=True)
    point_to(path, config, console)
    return found


def summary(findings: Trials, base: str, ours: str) -> dict[str, Any]:
    """Every number of the comparison, JSON-like.

    Args:
        base: the row that the others are compared with.
        ours: the row that is compared with each of the others, if it is there.
    """
    runs: Runs = {}
    asked: dict[str, list[dict[str, list[float] | None]]] = {}
    for trial, outcome in zip(findings.trials, findings.outcomes, strict=True):
        scored = outcome.equilibrium.scored
        runs.setdefault(trial.values["row"], []).append(_run(trial, outcome))
        asked.setdefault(trial.values["row"], []).append({name: by_item(each.folder) for name, each in scored.items()})
    benchmarks = list(runs[base][0]["scores"])
    tables = {label: [_by_item(each, name) for name in benchmarks] for label, each in asked.items()}
    rows = [_row(label, each, benchmarks, tables[label]) for label, each in runs.items()]
    for row, against in zip(rows, _compared(runs, tables, [(label, base) for label in runs]), strict=True):
        row["against"] = against
    opponents = [label for label in runs if label != ours] if ours in runs else []
    duels = _compared(runs, tables, [(ours, label) for label in opponents])
    return {
        "name": findings.trials[0].config.name,
        "base": base,
        "ours": ours,
        "duels": [{"against": label, **duel} for label, duel in zip(opponents, duels, strict=True)],
        "confidence": CONFIDENCE,
        "without_items": [name for n, name in enumerate(benchmarks) if any(t[n] is None for t in tables.values())],
        "seeds": [run["seed"] for run in runs[base]],
        "benchmarks": benchmarks,
        "wall": findings.wall,
        "rows": rows,
    }


def table(found: dict[str, Any], width: int) -> Table:
    """The report's table, or as much of it as can be read in ``width`` characters."""
    columns, rows = _columns(found), _cells(found)
    words = [max(len(word) for word in " ".join(cells).split()) for cells in zip(columns, *rows, strict=True)]
    kept = list(range(len(columns)))
    if sum(words) + 3 * len(words) >= width:
        kept = [n for n in kept if columns[n] not in (*found["benchmarks"], "spread", "reference loss", "volumes")]
    return _shown([columns[n] for n in kept], [[row[n] for n in kept] for row in rows])


def _shown(columns: list[str], rows: list[list[str]]) -> Table:
    """A table for a terminal in which no word is cut off."""
    shown = Table()
    for column, *cells in zip(columns, *rows, strict=True):
        shown.add_column(column, min_width=max(len(word) for word in " ".join([column, *cells]).split()))
    for row in rows:
        shown.add_row(*row)
    return shown


def write(folder: Path, found: dict[str, Any]) -> Path:
    """The report, its pictures, and its numbers as CSV and JSON into ``folder``; returns the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(found, indent=1))
    with (folder / "runs.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        domains = list(found["rows"][0]["runs"][0]["volumes"])
        head = ["method", "seed", *found["benchmarks"], "overall", "reference_loss", *(f"volume_{d}" for d in domains)]
        writer.writerow([*head, "search_passes", "search_seconds", "sft_passes", "sft_seconds"])
        for row in found["rows"]:
            for run in row["runs"]:
                scores = [run["scores"][name] for name in found["benchmarks"]]
                spent = [run[part][unit] for part in ("search", "sft") for unit in (PASSES, "seconds")]
                values = [*scores, run["overall"], run["loss"], *run["volumes"].values(), *spent]
                writer.writerow([row["label"], run["seed"], *values])
    for name, figure in {"scores": scores_picture(found), "volumes": volumes_picture(found)}.items():
        figure.savefig(folder / f"{name}.png", dpi=130)
    lines = [f"# {found['name']}: methods compared", "", *_markdown(_columns(found), _cells(found)), ""]
    lines += [*_markdown(*_duels(found)), ""] if found["duels"] else []
    lines += [*legend(found), "", "![scores](scores.png)", "![volumes](volumes.png)", ""]
    path = folder / "compare.md"
    path.write_text("\n".join(lines))
    return path


def legend(found: dict[str, Any]) -> list[str]:
    """What the columns say."""
    count, without = len(found["seeds"]), found["without_items"]
    lines = [
        f"Means over {count} seed{'s' * (count > 1)}; {found['confidence']:.0%} intervals over seeds and benchmarks' "
        "items, each by itself; differences are paired by seed and item, p two-sided and adjusted for all that a table "
        "compares (Holm). Worst and spread: lowest benchmark, and highest less lowest. Search: what a method spent "
        "besides its final SFT, as multiples of that, in token passes (an input token forward is 1, backward 2, each "
        "tangent 1), and seconds. `base` is the model before any SFT."
    ]
    if without:
        lines.append(f"{', '.join(without)}: no scores by item, so that intervals know of seeds alone.")
    return lines


def metrics(found: dict[str, Any]) -> dict[str, float]:
    """What MLflow shows of the comparison itself."""
    kept: dict[str, float] = {}
    for row in found["rows"]:
        name = row["label"].replace("=", " ").replace(",", " ")
        kept |= {f"overall/{name}": row["overall"]["mean"], f"search/{name}": row["search_share"]}
    return kept


def scores_picture(found: dict[str, Any]) -> Figure:
    """Overall score by method, with its interval, and against what choosing the mixture took."""
    rows = found["rows"]
    figure = Figure(figsize=(12, 1.5 + 0.4 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2)
    means = [row["overall"]["mean"] for row in rows]
    reach = [_finite(row["overall"]["high"] - row["overall"]["mean"]) for row in rows]
    left.errorbar(means, range(len(rows)), xerr=reach, fmt="o", capsize=3)
    left.set_yticks(range(len(rows)), [row["label"] for row in rows])
    left.invert_yaxis()
    left.set(xlabel=f"mean benchmark score ({found['confidence']:.0%} interval over seeds and items)")
    costs = [row["search_share"] for row in rows]
    right.errorbar(costs, means, yerr=reach, fmt="o", capsize=3)
    for row, cost, mean in zip(rows, costs, means, strict=True):
        right.annotate(row["label"], (cost, mean), fontsize=7, xytext=(4, 2), textcoords="offset points")
    right.set(xlabel="search, in passes of one SFT", ylabel="mean benchmark score")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def volumes_picture(found: dict[str, Any]) -> Figure:
    """Each method's volumes, mean over seeds."""
    rows = found["rows"]
    domains = list(rows[0]["volumes"])
    figure = Figure(figsize=(9, 1.5 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    start = np.zeros(len(rows))
    for domain in domains:
        sizes = np.array([row["volumes"][domain] for row in rows])
        axes.barh(range(len(rows)), sizes, left=start, label=domain)
        start += sizes
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="examples")
    axes.legend(fontsize=8, ncols=len(domains), loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return figure


def _run(trial: Trial, outcome: Outcome) -> dict[str, Any]:
    last = outcome.equilibrium
    scores = last.benchmark.result if last.benchmark else {}
    return {
        "seed": int(trial.values["seed"]),
        "volumes": last.volumes,
        "scores": {name: cell["value"] for name, cell in scores.items()},
        "overall": report.mean_score(scores),
        "loss": last.loss,
        "search": _spent(outcome.search),
        "sft": _spent([last.sft] if last.sft.kind == "sft" else []),
        "stopped": outcome.stopped,
    }


def _spent(records: list[Record[Any]]) -> dict[str, float]:
    """Token passes and seconds of stages, each counted once."""
    once = {(record.kind, record.fingerprint): record for record in records}.values()
    return {PASSES: sum(map(passes_of, once)), "seconds": sum(record.seconds for record in once)}


def passes_of(record: Record[Any]) -> int:
    """A stage's token passes: as it says itself, or those of its training and of each of its reference sets."""
    said = record.result.get(PASSES)
    if said is None or isinstance(said, dict):  # a reference set of that name
        return sum(int(row[PASSES]) for row in record.result.values())
    return int(said)


def _by_item(asked: list[dict[str, list[float] | None]], benchmark: str) -> Array | None:
    """[S, I] a benchmark's scores by seed and item; None unless every seed has them, of as many items."""
    parts = [each.get(benchmark) or [] for each in asked]
    return np.array(parts) if parts[0] and len({len(part) for part in parts}) == 1 else None


def _compared(runs: Runs, tables: Mapping[str, Tables], pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """How much more the first row of each pair has than the second; p is adjusted for all of them, p_alone isn't."""
    overall = {label: [run["overall"] for run in each] for label, each in runs.items()}
    found = [difference(overall[a], overall[b], CONFIDENCE, tables[a], tables[b]) for a, b in pairs]
    adjusted = iter(holm([each.p for each, (a, b) in zip(found, pairs, strict=True) if a != b]))
    return [
        {**asdict(each), "p": 1.0 if a == b else next(adjusted), "p_alone": each.p}
        for each, (a, b) in zip(found, pairs, strict=True)
    ]


def _row(label: str, runs: list[dict[str, Any]], benchmarks: list[str], tables: Tables) -> dict[str, Any]:
    overall = [run["overall"] for run in runs]
    means = {name: float(np.mean([run["scores"][name] for run in runs])) for name in benchmarks}
    found: dict[str, Any] = {
        "label": label,
        "runs": runs,
        "scores": means,
        "overall": asdict(estimate(overall, CONFIDENCE, tables)),
        "loss": asdict(estimate([run["loss"] for run in runs], CONFIDENCE)),
        "worst": min(means.values()),
        "spread": max(means.values()) - min(means.values()),
        "volumes": {d: float(np.mean([run["volumes"][d] for run in runs])) for d in runs[0]["volumes"]},
        "search_share": float(np.mean([run["search"][PASSES] / (run["sft"][PASSES] or 1) for run in runs])),
        "search_seconds": float(np.mean([run["search"]["seconds"] for run in runs])),
    }
    return found


def _columns(found: dict[str, Any]) -> list[str]:
    return [
        "",
        *found["benchmarks"],
        "overall",
        f"to {found['base']}",
        "p (Holm)",
        "worst",
        "spread",
        "reference loss",
        "search",
        "volumes",
    ]


def _cells(found: dict[str, Any]) -> list[list[str]]:
    base = next(row for row in found["rows"] if row["label"] == found["base"])
    lines = []
    for row in found["rows"]:
        overall, against = row["overall"], row["against"]
        compared = ["", ""]
        if row is not base:
            relative = against["mean"] / base["overall"]["mean"] if base["overall"]["mean"] else math.nan
            compared = [
                f"{against['mean']:+.3f}{_within(against, '+.3f')} ({relative:+.1%})",
                "" if len(found["seeds"]) == 1 else f"{against['p']:.2g}",
            ]
        lines.append(
            [
                row["label"],
                *(f"{row['scores'][name]:.3f}" for name in found["benchmarks"]),
                f"{overall['mean']:.3f}{_within(overall, '.3f')}",
                *compared,
                f"{row['worst']:.3f}",
                f"{row['spread']:.3f}",
                f"{row['loss']['mean']:.4f}",
                f"{row['search_share']:.1f}×, {row['search_seconds']:.0f} s",
                " ".join(f"{volume:.0f}" for volume in row["volumes"].values()),
            ]
        )
    return lines


def _duels(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of this project's method against each other row."""
    lines = []
    for duel in found["duels"]:
        p = "" if len(found["seeds"]) == 1 else f"{duel['p']:.2g}"
        lines.append([duel["against"], f"{duel['mean']:+.3f}{_within(duel, '+.3f')}", p])
    return [f"{found['ours']} against", "overall", "p (Holm)"], lines


def _markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    head = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    return [*head, *("| " + " | ".join(row) + " |" for row in rows)]


def _within(found: dict[str, float], form: str) -> str:
    if math.isinf(found["high"]):
        return ""
    return f" [{found['low']:{form}}, {found['high']:{form}}]"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
