"""What a comparison of methods found: the paper's kind of table, plots, CSV and JSON.

Rows are methods, columns benchmarks; means over seeds, with intervals, and paired differences to Joint SFT.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ideal.comparison import difference, estimate
from service import report
from service.mixtures import Outcome
from service.run import notices, point_to
from service.stages import Record
from service.sweep import Findings, Trial, sweep_key
from service.tracking import Tracker

CONFIDENCE = 0.95
"""Level of the intervals over seeds."""


def present(findings: Findings, console: Console, *, base: str) -> dict[str, Any]:
    """Show a comparison, and leave it as files and in MLflow; returns all its numbers."""
    config, key = findings.trials[0].config, sweep_key(findings.trials)
    found = summary(findings, base)
    folder = config.root / "comparisons" / f"{config.name}-{key}"
    path = write(folder, found)
    tracker = Tracker(config, f"comparison-{key}", folder, notices(console), name=f"{config.name} comparison")
    tracker.write_study(metrics(found))
    console.print(table(found, console.width))
    for line in legend(found):
        console.print(line, soft_wrap=True)
    point_to(path, config, console)
    return found


def summary(findings: Findings, base: str) -> dict[str, Any]:
    """Every number of the comparison, JSON-like.

    Args:
        base: the row that the others are compared with.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for trial, outcome in zip(findings.trials, findings.outcomes, strict=True):
        runs.setdefault(trial.values["row"], []).append(_run(trial, outcome))
    benchmarks = list(runs[base][0]["scores"])
    rows = [_row(label, each, runs[base], benchmarks) for label, each in runs.items()]
    return {
        "name": findings.trials[0].config.name,
        "base": base,
        "confidence": CONFIDENCE,
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
    shown = Table()
    for n in kept:
        shown.add_column(columns[n], min_width=words[n])
    for row in rows:
        shown.add_row(*(row[n] for n in kept))
    return shown


def write(folder: Path, found: dict[str, Any]) -> Path:
    """The report, its pictures, and its numbers as CSV and JSON into ``folder``; returns the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(found, indent=1))
    with (folder / "runs.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        domains = list(found["rows"][0]["runs"][0]["volumes"])
        head = ["method", "seed", *found["benchmarks"], "overall", "reference_loss", *(f"volume_{d}" for d in domains)]
        writer.writerow([*head, "search_tokens", "search_seconds", "sft_tokens", "sft_seconds"])
        for row in found["rows"]:
            for run in row["runs"]:
                scores = [run["scores"][name] for name in found["benchmarks"]]
                spent = [run[part][unit] for part in ("search", "sft") for unit in ("tokens", "seconds")]
                values = [*scores, run["overall"], run["loss"], *run["volumes"].values(), *spent]
                writer.writerow([row["label"], run["seed"], *values])
    for name, figure in {"scores": scores_picture(found), "volumes": volumes_picture(found)}.items():
        figure.savefig(folder / f"{name}.png", dpi=130)
        plt.close(figure)
    columns = _columns(found)
    lines = [f"# {found['name']}: methods compared", ""]
    lines += ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in _cells(found)]
    lines += ["", *legend(found), "", "![scores](scores.png)", "![volumes](volumes.png)", ""]
    path = folder / "compare.md"
    path.write_text("\n".join(lines))
    return path


def legend(found: dict[str, Any]) -> list[str]:
    """What the columns say."""
    count = len(found["seeds"])
    return [
        f"Means over {count} seed{'s' * (count > 1)}; overall with its {found['confidence']:.0%} interval over seeds; "
        f"differences to {found['base']} are paired by seed, p two-sided. Worst and spread: lowest benchmark, and "
        "highest less lowest. Search: tokens that a method passed over before its final SFT, as multiples of that "
        "SFT's, and seconds."
    ]


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
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 1.5 + 0.4 * len(rows)), layout="constrained")
    means = [row["overall"]["mean"] for row in rows]
    reach = [_finite(row["overall"]["high"] - row["overall"]["mean"]) for row in rows]
    left.errorbar(means, range(len(rows)), xerr=reach, fmt="o", capsize=3)
    left.set_yticks(range(len(rows)), [row["label"] for row in rows])
    left.invert_yaxis()
    left.set(xlabel=f"mean benchmark score ({found['confidence']:.0%} interval over seeds)")
    costs = [row["search_share"] for row in rows]
    right.errorbar(costs, means, yerr=reach, fmt="o", capsize=3)
    for row, cost, mean in zip(rows, costs, means, strict=True):
        right.annotate(row["label"], (cost, mean), fontsize=7, xytext=(4, 2), textcoords="offset points")
    right.set(xlabel="search, in tokens of one SFT", ylabel="mean benchmark score")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def volumes_picture(found: dict[str, Any]) -> Figure:
    """Each method's volumes, mean over seeds."""
    rows = found["rows"]
    domains = list(rows[0]["volumes"])
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.35 * len(rows)), layout="constrained")
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
        "sft": _spent([last.sft]),
        "stopped": outcome.stopped,
    }


def _spent(records: list[Record]) -> dict[str, float]:
    """Tokens and seconds of stages, each counted once."""
    once = {(record.kind, record.fingerprint): record for record in records}.values()
    return {"tokens": sum(map(tokens_of, once)), "seconds": sum(record.seconds for record in once)}


def tokens_of(record: Record) -> int:
    """Tokens that a stage passed over: what it says itself, or those of its reference sets and its training."""
    if "tokens" in record.result and not isinstance(record.result["tokens"], dict):
        return int(record.result["tokens"])
    return sum(int(row["tokens"] if isinstance(row, dict) else row) for row in record.result.values())


def _row(label: str, runs: list[dict[str, Any]], base: list[dict[str, Any]], benchmarks: list[str]) -> dict[str, Any]:
    overall = [run["overall"] for run in runs]
    means = {name: float(np.mean([run["scores"][name] for run in runs])) for name in benchmarks}
    found: dict[str, Any] = {
        "label": label,
        "runs": runs,
        "scores": means,
        "overall": asdict(estimate(overall, CONFIDENCE)),
        "against": asdict(difference(overall, [run["overall"] for run in base], CONFIDENCE)),
        "loss": asdict(estimate([run["loss"] for run in runs], CONFIDENCE)),
        "loss_against": asdict(difference([r["loss"] for r in runs], [r["loss"] for r in base], CONFIDENCE)),
        "worst": min(means.values()),
        "spread": max(means.values()) - min(means.values()),
        "volumes": {d: float(np.mean([run["volumes"][d] for run in runs])) for d in runs[0]["volumes"]},
        "search_share": float(np.mean([run["search"]["tokens"] / run["sft"]["tokens"] for run in runs])),
        "search_seconds": float(np.mean([run["search"]["seconds"] for run in runs])),
    }
    return found


def _columns(found: dict[str, Any]) -> list[str]:
    return [
        "",
        *found["benchmarks"],
        "overall",
        f"to {found['base']}",
        "p",
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
                "" if math.isinf(against["low"]) else f"{against['p']:.2g}",
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


def _within(found: dict[str, float], form: str) -> str:
    if math.isinf(found["high"]):
        return ""
    return f" [{found['low']:{form}}, {found['high']:{form}}]"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
