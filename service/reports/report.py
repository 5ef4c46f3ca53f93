"""What a run found, as rows for the screen, a Markdown report with pictures, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from ideal.analysis.pairs import Pair, pairs
from ideal.config.config import Config
from ideal.equilibrium import DILUTION, values
from ideal.influence.table import Array
from service.outcome import Iteration, Outcome
from service.store.stage import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[tuple[str, list[list[str]]]]
"""Groups: (heading, rows of label and one cell for each iteration)."""


def label(iteration: Iteration) -> str:
    """D1, or D1 (rejected)."""
    return iteration.name + ("" if iteration.accepted else " (rejected)")


def rows(outcome: Outcome) -> Rows:
    """The results table: a column for each mixture that was trained."""
    iterations = outcome.iterations
    domains = list(iterations[0].volumes)
    groups: Rows = [("volume (examples)", [[d, *(str(i.volumes[d]) for i in iterations)] for d in domains])]
    if not iterations[0].method:
        groups += [
            ("β, the next change", [[d, *(_beta(i, n) for i in iterations)] for n, d in enumerate(domains)]),
            (
                "influence of more, largest = 1",
                [[d, *(_value(i, n) for i in iterations)] for n, d in enumerate(domains)],
            ),
        ]
    losses = [[d, *(f"{i.reference.result[d]['loss']:.4f}" for i in iterations)] for d in domains]
    losses.append(["objective", *(f"{i.loss:.4f}" for i in iterations)])
    groups.append(("reference loss (nats per token)", losses))
    scored = next((i.benchmark.result for i in iterations if i.benchmark), None)
    if scored:
        cells = [[name, *(_score(i, name) for i in iterations)] for name in scored]
        groups.append(("benchmark score", [*cells, ["mean", *(_mean(i) for i in iterations)]]))
    return groups


def table(outcome: Outcome) -> Table:
    """The results table for a terminal."""
    shown = Table(*["", *(label(i) for i in outcome.iterations)], title_justify="left")
    for heading, lines in rows(outcome):
        shown.add_section()
        shown.add_row(f"[bold]{heading}[/]")
        for line in lines:
            shown.add_row(f"  {line[0]}", *line[1:])
    return shown


def summary(outcome: Outcome) -> dict[str, Any]:
    """Everything in the table, unrounded."""
    return {
        "stopped": outcome.stopped,
        "equilibrium": outcome.equilibrium.volumes,
        "data": outcome.data.result,
        "stages": [[r.kind, r.fingerprint, r.seconds] for r in outcome.records],
        "iterations": [
            {
                "name": label(i),
                "accepted": i.accepted,
                "m": i.m,
                "volumes": i.volumes,
                "objective": i.loss,
                "reference": i.reference.result,
                "benchmarks": i.benchmark.result if i.benchmark else None,
                "influence": i.table.matrix().tolist() if i.table else None,
                "curvature": i.influence.result if i.influence else None,
                "update": vars(i.update) if i.update else None,
                "stages": {
                    name: {"fingerprint": r.fingerprint, "seconds": r.seconds} for name, r in _stages(i).items()
                },
                "sft": i.sft.result,
            }
            for i in outcome.iterations
        ],
    }


def named_pairs(config: Config, outcome: Outcome) -> dict[str, Any] | None:
    """What more of each domain does to the others' reference sets, at the last mixture with an influence."""
    last = next((i for i in reversed(outcome.iterations) if i.table), None)
    if last is None or last.table is None:
        return None
    domains, settings = list(last.volumes), config.influence
    tokens = [outcome.data.result[domain]["tokens_per_example"] for domain in domains]
    volumes, crowding = list(last.volumes.values()), last.table.crowding.T

    def worth(influence: Array) -> Array:
        """[..., M, R] what an example of each domain is worth to each set."""
        by_set = np.swapaxes(influence, -1, -2)
        return np.swapaxes(values(by_set, crowding, volumes, tokens, "balanced", DILUTION), -1, -2)

    found = pairs(last.table, worth, resamples=settings.resamples, confidence=settings.confidence, seed=config.seed)

    def named(pair: Pair) -> dict[str, Any]:
        return {**vars(pair), "domain": domains[pair.domain], "reference": domains[pair.reference]}

    return {"at": label(last), "confidence": settings.confidence, "pairs": [named(pair) for pair in found]}


def write(folder: Path, config: Config, outcome: Outcome) -> Path:
    """The report and its pictures into ``folder``, unless they are there; returns its path."""
    path, whole = folder / "report.md", folder / "report.json"
    found = {**summary(outcome), "pairs": named_pairs(config, outcome)}
    text = json.dumps(found, indent=1)
    if path.exists() and whole.exists() and whole.read_text() == text:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    whole.unlink(missing_ok=True)
    pictures = {"volumes-and-scores": trajectory(outcome)}
    pictures |= {f"influence-D{i.number}": heatmap(i, config) for i in outcome.accepted if i.table}
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=130)
    path.write_text(_markdown(config, outcome, list(pictures), found["pairs"]))
    whole.write_text(text)  # last: it says that the others are there
    return path


def _stages(iteration: Iteration) -> dict[str, Record[Any]]:
    """By kind; each benchmark besides, by its name."""
    recorded = (iteration.sft, iteration.reference, iteration.influence, iteration.benchmark)
    each = {f"benchmark {name}": record for name, record in iteration.scored.items()}
    return {record.kind: record for record in recorded if record} | each


def trajectory(outcome: Outcome) -> Figure:
    """Volumes and scores by accepted iteration."""
    from matplotlib.figure import Figure  # a second to load; a report that is there isn't drawn again

    iterations = outcome.accepted
    at = [i.number for i in iterations]
    scored = [i for i in iterations if i.benchmark]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for domain in iterations[0].volumes:
        left.plot(at, [i.volumes[domain] for i in iterations], "o-", label=domain)
    left.set(title="Volumes", ylabel="examples", ylim=(0, None))
    for name in scored[0].benchmark.result if scored and scored[0].benchmark else []:
        cells = [i.benchmark.result[name] for i in scored if i.benchmark]
        errors = [c["stderr"] or 0 for c in cells]
        right.errorbar([i.number for i in scored], [c["value"] for c in cells], errors, fmt="o-", capsize=3, label=name)
    right.set(title="Benchmark scores (± standard error)", ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks(at, [f"D{n}" for n in at])
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def heatmap(iteration: Iteration, config: Config) -> Figure:
    """The influence matrix with its intervals; each column (reference set) relative to its largest entry."""
    from matplotlib.figure import Figure

    assert iteration.table is not None
    matrix = iteration.table.matrix()
    cloud = iteration.table.resampled(config.influence.resamples, config.seed, config.influence.widening)
    tail = (1 - config.influence.confidence) / 2
    low, high = np.quantile(cloud, [tail, 1 - tail], axis=0)
    scale = np.abs(matrix).max(0, keepdims=True)
    scale[scale == 0] = 1
    domains = list(iteration.volumes)
    figure = Figure(figsize=(2 + 1.5 * len(domains), 1.5 + 0.7 * len(domains)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix / scale, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for (j, r), value in np.ndenumerate(matrix / scale):
        lo, hi = low[j, r] / scale[0, r], high[j, r] / scale[0, r]
        axes.text(
            r,
            j,
            f"{value:+.2f}\n[{lo:+.2f}, {hi:+.2f}]",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if abs(value) > 0.6 else "black",
        )
    axes.set_xticks(range(len(domains)), domains, rotation=20, ha="right")
    axes.set_yticks(range(len(domains)), domains)
    axes.set(xlabel="reference set", ylabel="training domain")
    axes.set_title(
        f"Influence at D{iteration.number} (+ lowers the loss; {config.influence.confidence:.0%} intervals)", fontsize=9
    )
    figure.colorbar(image, shrink=0.8)
    return figure


def _markdown(config: Config, outcome: Outcome, pictures: list[str], found_pairs: dict[str, Any] | None) -> str:
    names = [label(i) for i in outcome.iterations]
    lines = [f"# {config.name}", "", f"Ended: {outcome.stopped}.", ""]
    lines += [f"Equilibrium: {', '.join(f'{d} {v}' for d, v in outcome.equilibrium.volumes.items())}.", ""]
    for heading, cells in rows(outcome):
        lines += [f"| {heading} | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
        lines += ["| " + " | ".join(row) + " |" for row in cells] + [""]
    lines += [f"![{name}]({name}.png)\n" for name in pictures]
    lines += _who_helps_whom(found_pairs) if found_pairs else []
    lines += [] if outcome.iterations[0].method else _curvature(config, outcome)
    lines += [
        "## Data",
        "",
        "| domain | set | rows | used | rejected | also held out |",
        "| --- | --- | ---: | ---: | --- | ---: |",
    ]
    for domain, found in outcome.data.result.items():
        for part, account in found["account"].items():
            reasons = ", ".join(f"{n} {why}" for why, n in account["rejected"].items()) or "0"
            divided = f" ({account['divided']} rows divided)" if account.get("divided") else ""
            lines.append(
                f"| {domain} | {part} | {account['rows']}{divided} | {account['used']} | {reasons} "
                f"| {account['overlapping']} |"
            )
    rejected = [row for f in outcome.data.result.values() for a in f["account"].values() for row in a["rejected_rows"]]
    lines += ["", *(f"- {row}" for row in rejected)]
    lines += ["", "## Stages", "", "| stage | fingerprint | seconds |", "| --- | --- | ---: |"]
    lines += [f"| {r.kind} | {r.fingerprint} | {r.seconds:.1f} |" for r in outcome.records]
    return "\n".join(lines) + "\n"


def _curvature(config: Config, outcome: Outcome) -> list[str]:
    """How well each influence's system was behaved; a layer that needed help is named."""
    settings = config.influence
    together = ", its layers combined" if settings.joint else ""
    lines = ["## Curvature", "", f"Solver `{settings.solver}`{together}, damping {settings.damping}.", ""]
    for iteration in outcome.iterations:
        if not iteration.influence:
            continue
        found = iteration.influence.result
        worst = max(found.get("conditions", {"": 1.0}).items(), key=lambda item: item[1])
        says = [f"{label(iteration)}:"]
        if worst[1] > 1:
            says.append(f"largest condition number before damping {worst[1]:.1e} ({worst[0]}).")
        for name, ridge in found.get("repaired", {}).items():
            says.append(f"{name} was decomposed only with {ridge:g} of its mean eigenvalue on the diagonal.")
        lines.append("- " + " ".join(says) if len(says) > 1 else f"- {says[0]} nothing to invert.")
    return [*lines, ""]


def _who_helps_whom(found: dict[str, Any]) -> list[str]:
    level, real = found["confidence"], [pair for pair in found["pairs"] if pair["effect"] != "undecided"]
    lines = ["## Who helps and hurts whom", ""]
    lines += [
        f"At {found['at']}: what more of a domain, and so less of the rest, does to another domain's reference set; 1 "
        f"is the largest effect on that set. {level:.0%} bootstrap intervals; of the pairs named, about "
        f"{1 - level:.0%} may be luck (Benjamini-Hochberg). A domain "
        "also hurts by taking the place of a better one, often of the set's own.",
        "",
    ]
    if not real:
        return [*lines, f"None of the {len(found['pairs'])} pairs is beyond noise.", ""]
    lines += ["| more of | | reference set | effect |", "| --- | --- | --- | ---: |"]
    lines += [
        f"| {p['domain']} | {p['effect']} | {p['reference']} | {p['value']:+.2f} [{p['low']:+.2f}, {p['high']:+.2f}] |"
        for p in real
    ]
    return [*lines, "", f"Within the noise: {len(found['pairs']) - len(real)} of {len(found['pairs'])} pairs.", ""]


def _beta(iteration: Iteration, domain: int) -> str:
    return f"{iteration.update.beta[domain]:+.3f}" if iteration.update else ""


def _value(iteration: Iteration, domain: int) -> str:
    step = iteration.update
    if not step:
        return ""
    scale = max(map(abs, step.value)) or 1.0
    value, low, high = (x[domain] / scale for x in (step.value, step.low, step.high))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]" + ("" if step.decided[domain] else " undecided")


def _score(iteration: Iteration, name: str) -> str:
    if not iteration.benchmark:
        return ""
    cell = iteration.benchmark.result[name]
    error = f" ± {cell['stderr']:.3f}" if cell["stderr"] is not None else ""
    failed = cell.get("failed")  # older records have none
    return f"{cell['value']:.3f}{error}" + (f", no verdict on {failed}" if failed else "")


def _mean(iteration: Iteration) -> str:
    return f"{mean_score(iteration.benchmark.result):.3f}" if iteration.benchmark else ""


def mean_score(scores: Mapping[str, Any]) -> float:
    """Of all benchmarks alike."""
    return float(np.mean([cell["value"] for cell in scores.values()]))
