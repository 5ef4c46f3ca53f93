"""What a run has come to, and what a sweep, a comparison and a fidelity study have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ideal.config.config import Config
from ideal.equilibrium import Update
from ideal.errors import BadInput
from ideal.influence.table import Array, InfluenceTable
from service.stages.benchmark import Score
from service.stages.data import DomainData
from service.stages.influence import InfluenceResult
from service.stages.reference import SetLoss
from service.store.names import run_key
from service.store.stage import Record

Scores = Mapping[str, Score]


@dataclass
class Iteration:
    """A mixture, what it gave, and what follows from it.

    Attributes:
        number: t of D_t.
        m: of the step that led to it; None for D0.
        accepted: whether its reference loss is no more than ``max_rise`` above the lowest of those before it.
        benchmark: all its scores; their stages are in ``scored``, by benchmark.
        table, update: None where no update follows.
        method: what chose it, if it wasn't an update.
    """

    number: int
    volumes: dict[str, int]
    m: float | None
    sft: Record[Any]
    reference: Record[dict[str, SetLoss]]
    loss: float
    accepted: bool = True
    benchmark: Record[Scores] | None = None
    scored: dict[str, Record[Score]] = field(default_factory=dict)
    influence: Record[InfluenceResult] | None = None
    table: InfluenceTable | None = None
    update: Update | None = None
    method: str = ""

    @property
    def name(self) -> str:
        """D1, or the method's."""
        return self.method or f"D{self.number}"


@dataclass
class Outcome:
    """A whole optimisation, in the order it happened.

    Attributes:
        read: what the data was read as, before what is held out was removed.
        stopped: why it ended.
        tried: stages that a method went through to choose its mixture, besides ``iterations``.
    """

    data: Record[dict[str, DomainData]]
    iterations: list[Iteration] = field(default_factory=list)
    stopped: str = ""
    tried: list[Record[Any]] = field(default_factory=list)
    read: Record[Any] | None = None

    @property
    def accepted(self) -> list[Iteration]:
        return [iteration for iteration in self.iterations if iteration.accepted]

    @property
    def equilibrium(self) -> Iteration:
        """The accepted mixture of the lowest reference loss, the first of equal ones.

        Raises:
            BadInput: none is trained yet.
        """
        if not self.accepted:
            raise BadInput("mixture", "none is trained yet", "run it first; the same command goes on where it was")
        return min(self.accepted, key=lambda iteration: iteration.loss)

    @property
    def checkpoints(self) -> set[Path]:
        """The folders of the models that are kept."""
        tried = {record.folder for record in self.tried if record.kind == "sft"}
        return tried | {iteration.sft.folder for iteration in self.accepted}

    @property
    def records(self) -> list[Record[Any]]:
        parts = [(i.sft, i.reference, i.influence, *(i.scored.values() or [i.benchmark])) for i in self.iterations]
        read = [self.read, self.data] if self.read else [self.data]
        return [*read, *self.tried, *(record for part in parts for record in part if record)]

    @property
    def search(self) -> list[Record[Any]]:
        """What choosing the mixture took: all but its own SFT, scores, and a reference loss that decides nothing."""
        last = self.equilibrium
        alone = len(self.iterations) == 1
        parts = [(None if i is last and alone else i.reference, i.sft, i.influence) for i in self.iterations]
        found = [*self.tried, *(record for part in parts for record in part if record)]
        return [record for record in found if record.fingerprint != last.sft.fingerprint]


def as_one(scored: Mapping[str, Record[Score]]) -> Record[Scores]:
    """All scores of a checkpoint as one record: by benchmark; the seconds are those of all."""
    records = list(scored.values())
    names = " ".join(record.fingerprint for record in records)
    return Record(
        "benchmark",
        hashlib.sha256(names.encode()).hexdigest()[:20],
        records[0].folder,
        {name: record.result for name, record in scored.items()},
        sum(record.seconds for record in records),
        any(record.fresh for record in records),
    )


@dataclass(frozen=True)
class Trial:
    """A point of the grid.

    Attributes:
        label: its values, as the table shows them.
        values: by the config's path, as they were typed.
    """

    label: str
    values: dict[str, str]
    config: Config


@dataclass(frozen=True)
class Trials:
    """What a sweep's trials, or a comparison's, have come to.

    Attributes:
        outcomes: by trial; one that was stopped early has no ``stopped``.
        wall: seconds the sweep took this time.
        before: folders of the stages that were recorded when it began.
    """

    trials: list[Trial]
    outcomes: list[Outcome]
    wall: float
    before: set[Path]


def sweep_key(trials: list[Trial]) -> str:
    """The sweep's fingerprint: its runs'."""
    return hashlib.sha256(json.dumps(sorted(run_key(t.config) for t in trials)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Findings:
    """What a fidelity study has come to; M domains, R = M reference sets, S seeds.

    Attributes:
        volumes: D0.
        tokens: [M] mean supervised tokens of a domain's examples.
        actual: [S, M, R] dQ_r/dβ_j by mode.
        base: [S, R] reference losses at D0.
        tables: each seed's influence by solver.
        seconds: of one seed's influence by solver, and of one training under `training`.
    """

    domains: list[str]
    volumes: dict[str, int]
    tokens: list[float]
    actual: dict[str, Array]
    base: Array
    tables: dict[str, list[InfluenceTable]]
    seconds: dict[str, float]
