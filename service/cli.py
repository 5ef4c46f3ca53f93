"""What the ``ideal`` command runs.

Exit status: 0 done, 1 failed, 2 bad input; interrupted: 130 by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP (128 and the
signal's number, as shells have it).

What a command needs is imported when it is called, after its config is read: the environment that libraries look at
depends on it, and ``--help`` needs none of them.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ideal.errors import BadInput
from service.cluster import environment, interrupts
from service.errors import StageFailed

if TYPE_CHECKING:
    from ideal.config.config import Config

INTERRUPTED = 130
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of the disk that a user can mend."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Finds the right mixture of fine-tuning data.",
    pretty_exceptions_enable=False,
)
ConfigPath = Annotated[Path, typer.Argument(help="A YAML config; jobs/configs/ has some.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field: a.b=c. May be given again.", show_default=False)
]

Address = Annotated[
    str | None,
    typer.Option(help="The cluster's job API, e.g. http://head:8265.  [default: RAY_API_SERVER_ADDRESS, or here]"),
]
Job = Annotated[str, typer.Argument(help="As `ideal status` lists it.", show_default=False)]


def read(config: Path, overrides: list[str] | None, hub: bool = True, changed: Iterable[str] = ()) -> Config:
    """The config, with the hub out of reach unless it is asked for.

    Args:
        hub: whether the command reads models or data.
        changed: fields that get other values, too, which may be on the hub.
    """
    from ideal.config.file import load

    loaded = load(config, overrides)
    inputs = {field.partition(".")[0] for field in changed} & {"model", "domains", "benchmarks"}
    environment.reach_hub(hub and (bool(inputs) or environment.asks_hub(loaded)))
    return loaded


@app.command()
def run(
    config: ConfigPath,
    set_: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")
    ] = False,
) -> None:
    """Optimise a mixture: D0, and as many updates of it as the config asks for."""
    loaded = read(config, set_)
    if dry_run:
        from service.runs import dry_run as check

        check.dry_run(loaded, Console())
    else:
        from service.runs import run as runs

        runs.run(loaded, Console())


@app.command()
def plan(
    config: ConfigPath,
    set_: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(help="Shapes: a config.json, a model folder or a hub id.  [default: the config's model]"),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of a machine that isn't there.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of each, e.g. 80GB or 75GiB.")] = None,
    tflops: Annotated[float | None, typer.Option(min=0.1, help="Each one's TFLOP/s in the model's passes.")] = None,
    tokens_per_example: Annotated[int, typer.Option(min=1, help="Prompt and answer together.")] = 256,
) -> None:
    """Predict time and memory of each stage, for this machine or with --gpus for one that isn't there."""
    loaded = read(config, set_, hub=model is None or not Path(model).exists(), changed=["model"] if model else [])
    from service.planning.forecast import forecast

    forecast(
        loaded,
        Console(),
        model=model,
        gpus=gpus,
        gpu_memory=gpu_memory,
        tflops=tflops,
        tokens_per_example=tokens_per_example,
    )


@app.command("config")
def settings(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML config; jobs/configs/ has some.", show_default=False)
    ] = None,
    set_: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of configs, for editors.")] = False,
) -> None:
    """Print every setting and where its value is from, as a config that gives the same run."""
    from ideal.config import origins as config_origins

    if schema:
        typer.echo(json.dumps(config_origins.schema(), indent=2))
    elif config is None:
        raise BadInput("config", "no file is named", "ideal config my.yaml, or ideal config --schema")
    else:
        typer.echo(config_origins.with_origins(config, set_), nl=False)


@app.command()
def sync(config: ConfigPath, set_: Overrides = None) -> None:
    """Write to MLflow what it missed of a run while it couldn't be reached."""
    loaded = read(config, set_, hub=False)
    from service.runs import run as runs

    if not runs.sync(loaded, Console()):
        raise typer.Exit(1)


@app.command()
def fidelity(config: ConfigPath, set_: Overrides = None) -> None:
    """Measure how well each solver's influence predicts what retraining does."""
    loaded = read(config, set_)
    from service.runs import run as runs

    runs.fidelity(loaded, Console())


@app.command()
def sweep(
    config: ConfigPath,
    m: Annotated[str | None, typer.Option(help="Values of the update scale, e.g. 0.15,0.3,0.5.")] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            help="Values of any field: a.b=x,y,z; `seed` makes repeats. May be given again.", show_default=False
        ),
    ] = None,
    set_: Overrides = None,
    concurrent: Annotated[int, typer.Option(min=1, help="Trials at a time.")] = 2,
    stop_behind: Annotated[
        bool, typer.Option("--stop-behind", help="Stop a trial that falls behind the median of the others.")
    ] = False,
) -> None:
    """Run an optimisation for each value, sharing every stage that doesn't depend on it, and say which is best."""
    values = {"equilibrium.m": m.split(",")} if m else {}
    for each in param or []:
        path, _, listed = each.partition("=")
        values[path] = listed.split(",") if listed else []
    first = [f"{field}={listed[0]}" for field, listed in values.items() if listed]  # it may not hold without
    read(config, [*(set_ or []), *first], changed=values)
    from service.reports import sweep_report
    from service.runs import sweep as sweeps

    trials = sweeps.grid(config, set_, values)
    sweep_report.present(
        sweeps.run_trials(trials, Console(), concurrent=concurrent, stop_behind=stop_behind), Console()
    )


@app.command()
def compare(
    config: ConfigPath,
    methods: Annotated[str | None, typer.Option(help="Which, e.g. equilibrium,uniform,doremi. Default: all.")] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="One more row: settings of `equilibrium`, e.g. 'equilibrium.m=0.5 equilibrium.rule=paper'. May be "
            "given again.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repeats of each: the config's seed and those after it.")] = 5,
    set_: Overrides = None,
    concurrent: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 2,
) -> None:
    """Run every method with the same data, training, seeds and benchmarks, and say which is best, and how sure."""
    read(config, set_, changed=[assignment for settings in also or [] for assignment in settings.split()])
    from service.runs import compare as comparison

    comparison.compare(
        config,
        Console(),
        overrides=set_,
        methods=methods.split(",") if methods else [],
        also=also or [],
        seeds=seeds,
        concurrent=concurrent,
    )


@app.command()
def sensitivity(config: ConfigPath, set_: Overrides = None) -> None:
    """Say how the mixture hangs on the reference set, from a run's records; starts nothing."""
    loaded = read(config, set_, hub=False)
    from service.runs.sensitivity import examine

    examine(loaded, Console())


@app.command()
def export(
    config: ConfigPath,
    to: Annotated[Path, typer.Option(help="A new folder.", show_default=False)],
    set_: Overrides = None,
) -> None:
    """Write a run's mixture for other trainers: as data, as sampling probabilities, and as their configs."""
    loaded = read(config, set_)
    from service import export as exports

    exports.export(loaded, to, Console())


@app.command()
def submit(
    config: ConfigPath,
    set_: Overrides = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option(help="Show its output until it ends.")] = True,
) -> None:
    """Run a config on a cluster, as a Ray job of its own; the same run a second time joins the first."""
    loaded = read(config, set_, hub=False)
    from service import submit as jobs

    if not jobs.submit(loaded, Console(), address, follow=follow):
        raise typer.Exit(1)


@app.command()
def status(address: Address = None) -> None:
    """List a cluster's jobs."""
    from service import submit as jobs

    jobs.status(Console(), address)


@app.command()
def logs(
    job: Job,
    address: Address = None,
    follow: Annotated[bool, typer.Option(help="Until the job ends.")] = True,
) -> None:
    """Show a job's output."""
    from service import submit as jobs

    if not jobs.show(job, Console(), address, follow=follow):
        raise typer.Exit(1)


@app.command()
def stop(job: Job, address: Address = None) -> None:
    """End a job. What it has finished stays recorded."""
    from service import submit as jobs

    jobs.stop(job, Console(), address)


@app.command()
def doctor() -> None:
    """Say what is installed, what this machine has, and what would go wrong, each with its remedy."""
    from service.runs.doctor import examine

    if not examine(Console()):
        raise typer.Exit(1)


def guarded(arguments: list[str]) -> int:
    """Run a command; every failure is one message and an exit status. ``service.cluster.interrupts`` has Ctrl-C."""
    environment.prepare()
    error = Console(stderr=True, highlight=False)
    try:
        app(arguments)
    except BadInput as problem:
        error.print(f"[red]error[/] {escape(str(problem))}", soft_wrap=True)  # paths stay whole
        return 2
    except StageFailed as failure:
        error.print(f"[red]failed[/] {escape(str(failure))}", soft_wrap=True)
        return 1
    except OSError as problem:
        if problem.errno not in UNWRITABLE:
            raise
        what = f"{problem.filename or 'a file'}: {problem.strerror}"
        error.print(
            f"[red]error[/] {escape(what)}\n  → make room, or let it be written; the same command goes on",
            soft_wrap=True,
        )
        return 2
    except (KeyboardInterrupt, SystemExit) as end:
        status = INTERRUPTED if isinstance(end, KeyboardInterrupt) else int(end.code or 0)
        if status == INTERRUPTED:  # typer turns Ctrl-C into this exit
            error.print(interrupts.GOES_ON)
        return status
    return 0
