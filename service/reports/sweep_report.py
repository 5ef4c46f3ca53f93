"""What a sweep found: which setting is best, how sure that is, what it cost; as a table, a picture and JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ideal.analysis.selection import Selection, interval, select
from ideal.config.config import Config
from service.outcome import Outcome, Trial, Trials, sweep_key
from service.reports import report
from service.reports.console import notices, point_to
from service.reports.tracking import Tracker
from service.stages.reference import BY_EXAMPLE, Losses

SEED = "seed"
"""Not a setting to choose among: trials that differ by it alone are repeats."""


def present(findings: Trials, console: Console) -> dict[str, Any]:
    """Print the table, write the report, and put the sweep's own figures into MLflow."""
    config, key = findings.trials[0].config, sweep_key(findings.trials)
    found = summary(findings)
    folder = config.root / "sweeps" / f"{config.name}-{key}"
    path = write(folder, found)
    tracker = Tracker(config, f"sweep-{key}", folder, notices(console), name=f"{config.name} sweep")
    tracker.write_study(metrics(found))
    console.print(table(found))
    for line in conclusion(found):
        console.print(line, soft_wrap=True)
    point_to(path, config, console)
    return found


def summary(findings: Trials) -> dict[str, Any]:
    """Every number of the sweep, JSON-like."""
    config = findings.trials[0].config
    groups = _groups(findings)
    chosen = _selection(groups, config)
    found: dict[str, Any] = {
        "name": config.name,
        "trials": [_trial(t, o) for t, o in zip(findings.trials, findings.outcomes, strict=True)],
        "settings": [{"label": label, **_setting(pairs)} for label, pairs in groups.items()],
        "confidence": config.influence.confidence,
        "cost": _cost(findings),
    }
    if chosen:
        for n, setting in enumerate(found["settings"]):
            setting |= {"loss": chosen.losses[n], "chance": chosen.chances[n]}
            setting |= {"above": chosen.losses[n] - chosen.losses[chosen.best]}
            setting |= {"above_low": chosen.low[n], "above_high": chosen.high[n]}
        found["best"] = found["settings"][chosen.best]["label"]
        found["best_between"] = _between(groups, chosen, config.influence.confidence)
    return found


def table(found: dict[str, Any]) -> Table:
    """The settings, in the order they were given."""
    shown = Table(*_columns(found))
    for row in _rows(found):
        shown.add_row(*row)
    return shown


def conclusion(found: dict[str, Any]) -> list[str]:
    """Which setting is best, and what the sweep cost."""
    lines = ["The reference sets differ between trials: their losses can't be compared."]
    if "best" in found:
        chance = next(s["chance"] for s in found["settings"] if s["label"] == found["best"])
        lines = [f"Best on the reference sets: {found['best']}, in {chance:.0%} of resamples"]
        if found["best_between"]:
            low, high = found["best_between"]
            lines[0] += f"; {found['confidence']:.0%} of them lie between {low:g} and {high:g}"
        lines[0] += "."
    cost = found["cost"]
    lines.append(
        f"{len(found['trials'])} trials are {cost['stages']} stages, and would be {cost['apart']} if they shared none; "
        f"{cost['fresh']} of them ran now, in {cost['wall']:.0f} s."
    )
    return lines


def write(folder: Path, found: dict[str, Any]) -> Path:
    """The report and its picture into ``folder``; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(found, indent=1))
    figure = picture(found)
    figure.savefig(folder / "sweep.png", dpi=130)
    columns = _columns(found)
    lines = [f"# {found['name']}: a sweep", ""]
    lines += ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in _rows(found)]
    lines += ["", *conclusion(found), "", "![losses and scores](sweep.png)", ""]
    lines += ["| trial | volumes | ended |", "| --- | --- | --- |"]
    for trial in found["trials"]:
        volumes = ", ".join(f"{name} {volume}" for name, volume in trial["volumes"].items())
        lines.append(f"| {trial['label']} | {volumes} | {trial['stopped']} |")
    path = folder / "sweep.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def metrics(found: dict[str, Any]) -> dict[str, float]:
    """What MLflow shows of the sweep itself."""
    kept = {f"cost/{name}": float(value) for name, value in found["cost"].items()}
    if "best" in found:
        kept["objective"] = min(float(setting["loss"]) for setting in found["settings"])
    return kept


def picture(found: dict[str, Any]) -> Figure:
    """Loss above the best one's, and mean score, by setting."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    settings = found["settings"]
    at = range(len(settings))
    if "best" in found:
        above = np.array([s["above"] for s in settings])
        off = np.abs([[s["above"] - s["above_low"], s["above_high"] - s["above"]] for s in settings]).T
        left.errorbar(at, above, off, fmt="o", capsize=4)
    left.axhline(0, color="grey", linewidth=0.8)
    left.set(title=f"Reference loss above the best ({found['confidence']:.0%} intervals)", ylabel="nats per token")
    right.errorbar(at, [s["score"] for s in settings], [s["stderr"] for s in settings], fmt="o", capsize=4)
    right.set(title="Mean benchmark score (± standard error)", ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks(list(at), [s["label"] for s in settings], rotation=20, ha="right")
        axes.grid(alpha=0.3)
    return figure


Groups = dict[str, list[tuple[Trial, Outcome]]]


def _groups(findings: Trials) -> Groups:
    """Trials that differ by their seed alone, together."""
    groups: Groups = {}
    for trial, outcome in zip(findings.trials, findings.outcomes, strict=True):
        values = [
            f"{path}={value}".removeprefix("equilibrium.") for path, value in trial.values.items() if path != SEED
        ]
        groups.setdefault(", ".join(values) or "all seeds", []).append((trial, outcome))
    return groups


def _selection(groups: Groups, config: Config) -> Selection | None:
    """None where trials' reference sets aren't the same."""
    read: list[list[Losses]] = [
        [json.loads((o.equilibrium.reference.folder / BY_EXAMPLE).read_text()) for _, o in pairs]
        for pairs in groups.values()
    ]
    tokens = [{name: counts for name, (_, counts) in losses.items()} for row in read for losses in row]
    if any(each != tokens[0] for each in tokens) or len({len(row) for row in read}) > 1:
        return None
    return select(
        [np.array([[losses[name][0] for losses in row] for row in read]) for name in tokens[0]],
        [np.array(counts, float) for counts in tokens[0].values()],
        objective=config.equilibrium.objective,
        resamples=config.influence.resamples,
        confidence=config.influence.confidence,
        seed=config.seed,
    )


def _between(groups: Groups, chosen: Selection, confidence: float) -> tuple[float, float] | None:
    """Where a sweep over one number has its best value; None for any other."""
    settings = [{p: v for p, v in pairs[0][0].values.items() if p != SEED} for pairs in groups.values()]
    try:
        (path,) = settings[0]
        return interval([float(values[path]) for values in settings], chosen.chances, confidence)
    except ValueError:
        return None


def _setting(pairs: list[tuple[Trial, Outcome]]) -> dict[str, Any]:
    """Its mean score over seeds and benchmarks, as far as they were scored."""
    scored = [o.equilibrium.benchmark.result for _, o in pairs if o.equilibrium.benchmark]
    errors = [cell["stderr"] or 0.0 for scores in scored for cell in scores.values()]
    return {
        "volumes": [o.equilibrium.volumes for _, o in pairs],
        "score": float(np.mean([report.mean_score(scores) for scores in scored])) if scored else math.nan,
        "stderr": math.sqrt(sum(e * e for e in errors)) / len(errors) if errors else 0.0,
    }


def _trial(trial: Trial, outcome: Outcome) -> dict[str, Any]:
    return {
        "label": trial.label,
        "values": trial.values,
        "objectives": [i.loss for i in outcome.iterations],
        "accepted": [i.accepted for i in outcome.iterations],
        "volumes": outcome.equilibrium.volumes,
        "stopped": outcome.stopped or f"stopped at D{outcome.iterations[-1].number}: behind the others",
    }


def _cost(findings: Trials) -> dict[str, float]:
    """Stages of all trials, stages if each trial ran its own, stages that ran this time, and its seconds."""
    alone = [{record.folder for record in outcome.records} for outcome in findings.outcomes]
    together = set().union(*alone)
    return {
        "stages": len(together),
        "apart": sum(map(len, alone)),
        "fresh": len(together - findings.before),
        "wall": findings.wall,
    }


def _columns(found: dict[str, Any]) -> list[str]:
    level = f"{found['confidence']:.0%}"
    return ["", "reference loss", f"above the best, {level}", "best in", "mean score", "volumes"]


def _rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for s in found["settings"]:
        compared = ["", "", ""]
        if "best" in found:
            compared = [f"{s['loss']:.4f}", f"[{s['above_low']:+.4f}, {s['above_high']:+.4f}]", f"{s['chance']:.0%}"]
        volumes = [" ".join(map(str, each.values())) for each in s["volumes"]]
        rows.append([s["label"], *compared, f"{s['score']:.3f} ± {s['stderr']:.3f}", "; ".join(volumes)])
    return rows
