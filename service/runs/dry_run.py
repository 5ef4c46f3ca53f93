"""``--dry-run``: everything that can be known of a run without starting it.

What is wrong is an error. What only another machine can tell (a hub dataset without a network, GPUs that aren't
here) is listed, so that a run meant for a cluster can be checked on a laptop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from ideal.benchmarks import tasks
from ideal.config.config import Config
from ideal.config.inputs import Source
from ideal.data.chat import ChatEncoder, Unusable
from ideal.data.domains import prepare, starting_volumes
from ideal.data.row_files import files_of
from ideal.data.sources import messages, rows
from ideal.errors import BadInput
from ideal.model.base import check_tensors, load_tokenizer, shapes, smollm2_tokenizer
from ideal.model.files import local_folder, read_template
from service.cluster import cluster
from service.cluster.precision import decide
from service.planning.memory import GIB
from service.planning.plan import Plan, plan
from service.planning.room import check_runs
from service.reports.console import notices
from service.reports.handed_over import check_server
from service.runs.run import replay
from service.store.remote import remote_of

PEEK = 50
"""Rows of a hub dataset that are looked at."""


def dry_run(config: Config, console: Console) -> None:
    """Check a config and print its plan.

    Raises:
        BadInput: the first thing that doesn't hold.
    """
    elsewhere: list[str] = []
    check_server(config)
    tasks.check(config.benchmarks, allow_code_execution=config.allow_code_execution)
    console.print(f"✓ {len(config.benchmarks)} benchmarks: {', '.join(b.name for b in config.benchmarks)}")
    tokenizer = _tokenizer(config)
    if config.model.made:
        console.print("✓ model: the run makes it, and its tokenizer; here rows are read with SmolLM2's")
    elif tokenizer is None:
        elsewhere.append(f"model.source: {config.model.source} needs the hub, which doesn't answer here")
    encoder = ChatEncoder(tokenizer, config.model.max_tokens) if tokenizer else None
    if encoder:
        console.print("✓ chat template")
    _check_domains(config, encoder, console, elsewhere)
    try:
        machine = cluster.connect(config) if config.resources.address else cluster.local(config)
        decision = decide([config], elsewhere.append, begins=bool(config.resources.address))
        (config,) = decision.configs
        console.print(f"✓ {machine.describe()}, {decision}")
    except BadInput as problem:
        if problem.where != "resources.gpus":
            raise
        elsewhere.append(str(problem).splitlines()[0])
        wanted = config.resources.gpus or 0
        machine = cluster.share(wanted * 8, wanted, 1, config.resources)
        config = config.decided("bf16")  # as GPUs have it
    known = shapes(config.model)
    if known is not None:
        _print_plan(plan(config, known, machine), config, machine, console)
    _print_stages(config, console)
    for line in elsewhere:
        console.print(f"[yellow]not here[/] {escape(line)}", soft_wrap=True)
    console.print("This machine can't start it; one that has the above can." if elsewhere else "Ready to run.")


def before_start(config: Config) -> None:
    """What a run would else find only once Ray is up and stages are recorded, but for room (``service.planning``).

    Raises:
        BadInput: a file or the model isn't there, a domain has fewer rows than its volume, or this machine has too
            few GPUs.
    """
    check_server(config)
    tasks.check(config.benchmarks, allow_code_execution=config.allow_code_execution)
    local_folder(config.model)
    read_template(config.model)
    for where, source in _sources(config):
        files_of(source, where)
    for domain in config.domains:
        where = f"domains.{domain.name}.train"
        if domain.volume and not domain.train.hub:
            found = sum(1 for _ in islice(rows(domain.train, where), domain.volume))
            if found < domain.volume:
                raise BadInput(
                    f"domains.{domain.name}.volume",
                    f"asks for {domain.volume} examples, but its source has {found} rows",
                    "lower the volume or give more rows",
                )
    if not (config.resources.address or os.environ.get("RAY_ADDRESS") or ray.is_initialized()):
        cluster.local(config)


def _tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer with the template that will be used; None where only the hub has it.

    A tokenizer that the run makes has a smaller vocabulary, so that a row may be longer than it seems here.
    """
    if config.model.source in ("smollm2", "made"):
        tokenizer = smollm2_tokenizer()
    else:
        folder = local_folder(config.model)
        try:
            tokenizer = load_tokenizer(folder or Path(config.model.source))
            if folder:
                check_tensors(folder)
        except BadInput:
            if folder:
                raise
            return None
    template = read_template(config.model)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _check_domains(config: Config, encoder: ChatEncoder | None, console: Console, elsewhere: list[str]) -> None:
    """All rows of sources on this machine; the first rows of a hub's, if it answers."""
    sources = list(_sources(config))
    remote = [(where, source) for where, source in sources if source.hub]
    for where, source in remote:
        try:
            _peek(encoder, source.model_copy(update={"size": PEEK}), where)
        except BadInput as problem:
            if not problem.where.endswith(".hub"):
                raise
            elsewhere.append(f"{where}: {source.hub} can't be had")
    for where, source in sources:
        files_of(source, where)
    if remote or encoder is None:
        console.print(f"✓ {len(sources) - len(remote)} local sources")
        return
    here = [benchmark for benchmark in config.benchmarks if benchmark.reasoning_gym]
    domains = prepare(config, encoder, tasks.questions(here, allow_code_execution=config.allow_code_execution))
    found: dict[str, dict[str, Any]] = {
        d.name: {"pool": len(d.train), "reference": len(d.reference), "account": d.account} for d in domains
    }
    for name, volume in starting_volumes(config, found).items():
        accounts = found[name]["account"].values()
        rejected = sum(sum(part["rejected"].values()) for part in accounts)
        divided = sum(part["divided"] for part in accounts)
        console.print(
            f"✓ {name}: {volume} of {found[name]['pool']} examples, {found[name]['reference']} reference, "
            f"{rejected} rows rejected, {found[name]['account']['train']['overlapping']} also held out"
            + (f"; {divided} rows give an example for each answer: the template rewrites earlier turns" * bool(divided))
        )


def _peek(encoder: ChatEncoder | None, source: Source, where: str) -> None:
    """Try a source's rows.

    Raises:
        BadInput: it can't be read, or none of them can be used.
    """
    refused: list[str] = []
    for place, row in rows(source, where):
        try:
            made = messages(row, source)
            if encoder:
                encoder.encode(made)
            return
        except Unusable as reason:
            refused.append(f"{place}: {reason}")
    if refused:
        listed = "\n    ".join(refused[:5])
        raise BadInput(
            where,
            f"none of its first {len(refused)} rows can be used:\n    {listed}",
            "map their columns with `fields`",
        )


def _sources(config: Config) -> Iterator[tuple[str, Source]]:
    for domain in config.domains:
        yield f"domains.{domain.name}.train", domain.train
        yield f"domains.{domain.name}.reference", domain.reference


def _print_plan(found: Plan, config: Config, machine: cluster.Cluster, console: Console) -> None:
    needed, free = check_runs(
        [config], machine, replay(config, notices(console)).checkpoints if config.root.exists() else []
    )
    console.print(
        f"✓ memory: SFT {found.sft / GIB:.1f} of {found.sft_available / GIB:.1f} GiB × {machine.sft_workers}, "
        f"influence {found.influence / GIB:.1f} of {found.available / GIB:.1f} GiB × {machine.influence_workers} "
        f"in {found.layer_blocks} layer blocks"
    )
    console.print(f"✓ disk: {needed / GIB:.1f} GiB of {free / GIB:.1f} GiB free in {config.root}", soft_wrap=True)
    if remote := remote_of(config):
        console.print(f"✓ storage: {remote.url} answers", soft_wrap=True)


def _print_stages(config: Config, console: Console) -> None:
    if config.method != "equilibrium":
        first = "the base model" if config.method == "base" else "its mixture → SFT"
        console.print(f"  {config.method}: {first} → reference loss → benchmarks")
        return
    for number in range(config.equilibrium.iterations + 1):
        last = number == config.equilibrium.iterations
        console.print(f"  D{number}: SFT → reference loss → {'' if last else 'influence, '}benchmarks")
