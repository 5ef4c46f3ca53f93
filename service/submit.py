"""Runs as Ray jobs: each under its own fingerprint, so that a run that is submitted twice is there once.

A job is sent this installation's code and the config with every path absolute, nothing else: data, models and storage
are read where the config says, on a folder that the cluster's nodes share.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ideal.config.config import Config
from ideal.errors import BadInput
from service.cluster import interrupts
from service.store.names import run_name

CONFIG = "run.yaml"
CODE = ("ideal", "service", "jobs")
UNSENT = shutil.ignore_patterns("__pycache__", "configs", "results")
WAITING = (JobStatus.PENDING, JobStatus.RUNNING)


def submit(config: Config, console: Console, address: str | None, follow: bool = True) -> bool:
    """Start a run on a cluster, or join it if it is there, and show its output until it ends.

    A run that ended before, in whatever way, is started again: it goes on from its records.

    Args:
        address: of the cluster's job API. Default: RAY_API_SERVER_ADDRESS, else this machine's port 8265.
        follow: False returns once it is submitted.

    Returns:
        whether it succeeded, or was submitted.

    Raises:
        BadInput: no cluster answers, or it lets nobody in without its token.
    """
    cluster, name = client(address), run_name(config)
    there = _jobs(cluster).get(name)
    if there and there.status in WAITING:
        console.print(f"{name} is there already, {there.status.value.lower()}: joined")
    else:
        if there:
            console.print(f"{name} was there, {there.status.value.lower()}: it goes on from its records")
            cluster.delete_job(name)
        folder = interrupts.temporary_folder()
        _pack(folder, config)
        cluster.submit_job(
            entrypoint=f"python -m jobs.optimize {CONFIG}",
            submission_id=name,
            runtime_env={"working_dir": str(folder)},
            metadata={"config": config.name},
        )
        console.print(f"{name} submitted")
    if not follow:
        console.print(f"ideal logs {name}, ideal status, ideal stop {name}")
        return True
    return show(name, console, address)


def show(name: str, console: Console, address: str | None, follow: bool = True) -> bool:
    """Print a job's output, as it comes; whether the job succeeded so far.

    Raises:
        BadInput: no cluster answers, or there is no such job.
    """
    cluster = client(address)
    _existing(cluster, name)
    if not follow:
        console.print(escape(cluster.get_job_logs(name)), end="", soft_wrap=True, highlight=False)
        return True
    interrupts.say(f"stopped following; the job goes on: ideal logs {name} follows it, ideal stop {name} ends it")
    asyncio.run(_tail(cluster, name, console))
    while (status := cluster.get_job_status(name)) in WAITING:
        time.sleep(0.2)
    if status != JobStatus.SUCCEEDED:
        console.print(f"[red]{name} {status.value.lower()}[/]: {escape(cluster.get_job_info(name).message or '')}")
    return bool(status == JobStatus.SUCCEEDED)


def status(console: Console, address: str | None) -> None:
    """Print the cluster's jobs, the newest first.

    Raises:
        BadInput: no cluster answers.
    """
    table = Table("job", "status", "started", "seconds", "")
    jobs = sorted(_jobs(client(address)).values(), key=lambda job: -(job.start_time or 0))
    for job in jobs:
        began = job.start_time or 0
        until = job.end_time or int(time.time() * 1000)
        started = datetime.fromtimestamp(began / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        wrong = (job.message or "").splitlines()[:1] if job.status == JobStatus.FAILED else []
        table.add_row(
            job.submission_id, job.status.value, started, f"{(until - began) / 1000:.0f}", *map(escape, wrong)
        )
    console.print(table if jobs else "no jobs on this cluster")


def stop(name: str, console: Console, address: str | None) -> None:
    """End a job; its finished stages stay.

    Raises:
        BadInput: no cluster answers, or there is no such job.
    """
    cluster = client(address)
    if _existing(cluster, name).status not in WAITING:
        console.print(f"{name} had ended already")
        return
    cluster.stop_job(name)
    while cluster.get_job_status(name) in WAITING:
        time.sleep(0.2)
    console.print(f"{name} stopped; submitted again, it goes on from the last finished stage")


def client(address: str | None) -> JobSubmissionClient:
    """The cluster's job API.

    Raises:
        BadInput: it doesn't answer, or not without its token.
    """
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        where = address or "this machine (RAY_API_SERVER_ADDRESS names another)"
        said = str(error).strip().splitlines()[0]
        hint = (
            "check the address; for a cluster with a token: export RAY_AUTH_MODE=token, and its token as Ray wants it"
        )
        raise BadInput("--address", f"no job API lets us in at {where}: {said}", hint) from None


def _jobs(cluster: JobSubmissionClient) -> dict[str, JobDetails]:
    return {job.submission_id: job for job in cluster.list_jobs() if job.submission_id}


def _existing(cluster: JobSubmissionClient, name: str) -> JobDetails:
    jobs = _jobs(cluster)
    if name not in jobs:
        raise BadInput("job", f"there is no {name} on this cluster", f"`ideal status` lists {len(jobs)}")
    return jobs[name]


def _pack(folder: Path, config: Config) -> None:
    """What a job is sent."""
    for package in CODE:
        shutil.copytree(Path(__file__).parents[1] / package, folder / package, ignore=UNSENT)
    text = yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    (folder / CONFIG).write_text(text)


async def _tail(cluster: JobSubmissionClient, name: str, console: Console) -> None:
    async for lines in cluster.tail_job_logs(name):
        console.print(escape(lines), end="", soft_wrap=True, highlight=False)
