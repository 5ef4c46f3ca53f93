"""`ideal compare`: every method with the same data, SFT, seeds and benchmarks, as trials of one Ray Tune experiment.

What methods share is one stage: Joint SFT is D0 of `equilibrium` and DoReMi's reference, the Specific SFT models are
what `merge` averages. The total volume is the same for all, so is the number of steps; what a method spends before
its final SFT is counted beside its score, in token passes (``ideal.costs``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ideal.config.config import Config
from ideal.config.file import load
from ideal.errors import BadInput
from ideal.methods import METHODS
from ideal.methods.regression import REGRESSORS
from service.outcome import Trial
from service.reports import compare_report
from service.runs.sweep import run_trials
from service.store.names import run_key

BASE = "joint"
"""The method that all others are measured against."""
OURS = "equilibrium"


def compare(
    path: str | Path,
    console: Console,
    *,
    overrides: list[str] | None,
    methods: Sequence[str],
    also: Sequence[str],
    seeds: int,
    concurrent: int,
) -> None:
    """Run all methods with all seeds, or go on where that was left, and report who wins.

    Args:
        also: more rows: settings of `equilibrium`, e.g. ``equilibrium.m=0.5 equilibrium.iterations=4``.
        seeds: the config's and those after it.
        concurrent: runs at a time.

    Raises:
        BadInput: something in a config doesn't hold.
        StageFailed: a run broke; the others ended.
    """
    trials = trials_of(path, overrides, methods, also, seeds)
    found = run_trials(trials, console, concurrent=concurrent, stop_behind=False, kind="comparison")
    compare_report.present(found, console, base=BASE, ours=OURS)


def trials_of(
    path: str | Path, overrides: list[str] | None, methods: Sequence[str], also: Sequence[str], seeds: int
) -> list[Trial]:
    """Every method with every seed, seed by seed: where it is stopped, whole seeds are done.

    Raises:
        BadInput: a config that doesn't hold, or one run twice.
    """
    base = load(path, overrides)
    entries = rows(base, methods, also)
    trials: dict[str, Trial] = {}
    for seed in range(base.seed, base.seed + seeds):
        for label, settings in entries.items():
            config = load(path, [*(overrides or []), *settings, f"seed={seed}"])
            if run_key(config) in trials:
                raise BadInput("compare", f"{label} is the same as {trials[run_key(config)].label}", "leave one out")
            trials[run_key(config)] = Trial(f"{label}, seed {seed}", {"row": label, "seed": str(seed)}, config)
    return list(trials.values())


def rows(config: Config, methods: Sequence[str], also: Sequence[str]) -> dict[str, list[str]]:
    """By label, what each row of the comparison sets in the config; `joint` first.

    Raises:
        BadInput: there is no such method.
    """
    entries: dict[str, list[str]] = {}
    for method in dict.fromkeys([BASE, *(methods or [*METHODS, OURS])]):
        if method not in (*METHODS, OURS):
            raise BadInput("--methods", f"there is no {method!r}", f"there are {', '.join([*METHODS, OURS])}")
        if method == "specific":
            for domain in config.domains:
                entries[f"specific {domain.name}"] = ["method=specific", f"methods.domain={domain.name}"]
        elif method == "regmix":
            for regressor in REGRESSORS:
                entries[f"regmix {regressor}"] = ["method=regmix", f"methods.regmix_regressor={regressor}"]
        else:
            entries[method] = [f"method={method}"]
    for settings in also:
        parts = settings.split()
        entries[f"{OURS} {' '.join(part.removeprefix('equilibrium.') for part in parts)}"] = [f"method={OURS}", *parts]
    return entries
