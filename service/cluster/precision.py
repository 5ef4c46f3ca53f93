"""What `precision: auto` means for a run: decided once, before any fingerprint, and kept beside the run.

Everything that names a run or a stage goes through ``decide``. A run that was begun goes on with what it began with,
on whatever machine; one that begins asks the machines that will work: on a cluster every node of them. Runs of one
sweep or comparison share one decision. torch is imported only where something is asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ideal.config.config import Config, Decided
from ideal.errors import BadInput
from service.cluster.cluster import address_of, connect
from service.cluster.own_ray import stop
from service.errors import in_a_line
from service.store.names import run_key
from service.store.remote import remote_of

if TYPE_CHECKING:
    from ideal.model.precision import Probe

FOLDER = "precision"
FILE = "precision.json"
Notice = Callable[[str], None]


@dataclass(frozen=True)
class Decision:
    """What takes the place of `auto` in some configs.

    Attributes:
        asked: the configs as they were given.
        precision: None where none of them says `auto`.
        reason: why, for the user.
        begun: whether it was decided before, when the runs began.
    """

    asked: tuple[Config, ...]
    precision: Decided | None = None
    reason: str = ""
    begun: bool = False

    @property
    def configs(self) -> list[Config]:
        """Those to run, in the same order; no precision is `auto`."""
        return [config if self.precision is None else config.decided(self.precision) for config in self.asked]

    def __str__(self) -> str:
        """fp32 (this processor has no native bf16)."""
        first = self.configs[0]
        sft, influence = first.sft.precision, first.influence.precision
        what = sft if sft == influence else f"SFT in {sft}, influence in {influence}"
        return f"{what} ({self.reason})" if self.reason else what

    def keep(self, notice: Notice) -> None:
        """Record it for the runs together and for each of them that has no record, here and where storage is.

        Called when they start. A precision that is slow here, since they were begun elsewhere, is warned of.

        Raises:
            BadInput: storage can't be written.
        """
        if self.precision is None:
            return
        if self.begun and self.precision == "bf16" and address_of(self.asked[0]) is None:
            _warn_where_slow(notice)
        undecided = [config for config in self.asked if config.undecided]
        body = json.dumps({"precision": self.precision, "reason": self.reason})
        for key in {_key(undecided), *map(run_key, undecided)}:
            place, remote = f"{FOLDER}/{key}", remote_of(undecided[0])
            folder = undecided[0].root / place
            try:
                if not (folder / FILE).exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    unfinished = folder.with_name(f".{key}-{os.getpid()}")
                    unfinished.write_text(body)
                    unfinished.rename(folder / FILE)
            except OSError as error:
                raise BadInput("storage", f"can't be written ({error})", "set storage to a folder of yours") from None
            if remote is None:
                continue
            try:
                if not remote.has(f"{place}/{FILE}"):
                    remote.keep(folder, place, FILE)
            except OSError as error:
                notice(f"{place} isn't at {remote.url} yet ({error}); the next run copies it")


def decide(configs: Sequence[Config], notice: Notice, *, begins: bool) -> Decision:
    """The precision of one run, or of several that are compared.

    Args:
        begins: they may start now, where a cluster's nodes must be asked; otherwise this machine alone is, since
            what was begun is recorded.

    Raises:
        BadInput: storage or the cluster can't be reached.
    """
    asked = tuple(configs)
    undecided = [config for config in asked if config.undecided]
    if not undecided:
        return Decision(asked)
    for key in dict.fromkeys([_key(undecided), *map(run_key, undecided)]):
        if recorded := _recorded(undecided[0], key):
            return Decision(asked, recorded, "as it was begun", begun=True)
    if begins and _elsewhere(undecided[0]):
        return Decision(asked, *together(on_nodes(undecided[0]), notice))
    here = on_this_machine()
    return Decision(asked, here.best, here.reason)


def decided(config: Config, notice: Notice) -> Config:
    """The config of a run whose records are read, nothing being started."""
    return decide([config], notice, begins=False).configs[0]


def together(found: dict[str, Probe], notice: Notice) -> tuple[Decided, str]:
    """One precision for nodes that work together, and why; nodes that differ are named.

    Args:
        found: by the node's name.
    """
    without = [name for name, node in found.items() if node.best == "fp32"]
    if without and len(without) < len(found):
        notice(f"nodes differ: everything is computed in fp32, since bf16 doesn't pay on {', '.join(sorted(without))}")
        have = "has" if len(without) == 1 else "have"
        return "fp32", f"{len(without)} of {len(found)} nodes {have} no fast bf16"
    first = next(iter(found.values()))
    return first.best, first.reason


def on_nodes(config: Config) -> dict[str, Probe]:
    """What each node of the cluster has that can work, by its address; a connection made for it ends with it.

    Raises:
        BadInput: no cluster answers.
    """
    fresh = not ray.is_initialized()
    cluster = connect(config)
    try:
        kind = "GPU" if cluster.gpus else "CPU"
        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        nodes = {node["NodeID"]: node for node in alive if node["Resources"].get(kind)}
        places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        answers = ray.get([_probe.options(scheduling_strategy=place).remote() for place in places])
        names = [f"{node['NodeManagerHostname']} ({key[:8]})" for key, node in nodes.items()]
        return dict(zip(names, answers, strict=True))
    except RayError as error:
        text = in_a_line(error)[:300]
        raise BadInput("resources.address", f"a node doesn't answer: {text}", "run the same command again") from None
    finally:
        if fresh:
            stop()


@ray.remote(num_cpus=0, max_calls=1)  # its process, and what it holds of a GPU, ends
def _probe() -> Probe:
    from ideal.model.precision import probe

    return probe()


def on_this_machine() -> Probe:
    """What this machine has; a GPU is asked in a process of its own, or this one would hold some of its memory."""
    import torch

    from ideal.model.precision import Probe, probe

    if not torch.cuda.is_available():
        return probe()
    command = [sys.executable, "-m", "ideal.model.precision"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    return Probe(**json.loads(ended.stdout))


def _elsewhere(config: Config) -> bool:
    """Whether a Ray that is there runs a config, on other machines than this one, perhaps."""
    return address_of(config) is not None or ray.is_initialized()


def _warn_where_slow(notice: Notice) -> None:
    if (here := on_this_machine()).best == "fp32":
        notice(
            f"this run was begun in bf16, and {here.reason} ({here}): "
            "--set sft.precision=fp32 --set influence.precision=fp32 begins another run, which is faster here"
        )


def _recorded(config: Config, key: str) -> Decided | None:
    folder = config.root / FOLDER / key
    remote = remote_of(config)
    if remote and not (folder / FILE).exists():
        try:
            remote.fetch(f"{FOLDER}/{key}", folder, FILE)
        except OSError as error:
            raise BadInput("storage", f"{remote.url} can't be read ({error})", "try again") from None
    try:
        kept = json.loads((folder / FILE).read_text())["precision"]
        (precision,) = (each for each in get_args(Decided) if each == kept)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(str(folder / FILE), f"can't be read ({error})", "remove it; the run then decides anew") from None
    return cast(Decided, precision)


def _key(configs: Sequence[Config]) -> str:
    """One run's own key, or one of all together."""
    keys = sorted({run_key(config) for config in configs})
    return keys[0] if len(keys) == 1 else hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:12]
