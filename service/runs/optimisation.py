"""The optimisation: D0 → D1 → D2, one stage after another.

    D0 ─▶ SFT ─▶ θ0 ─┬─▶ reference loss
                     ├─▶ influence ─▶ update ─▶ D1 ─▶ SFT ─▶ θ1 ─▶ …
                     └─▶ benchmarks

The result is the mixture of the lowest reference loss. One whose loss lies above the lowest so far by more than
``max_rise`` is rejected: the lowest one is updated again with m/2. Small rises can't add up, since each is held against
the lowest. Every stage is recorded, so a run that was killed goes on where it was, and one that is done does no work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ideal.config.config import Config
from ideal.data.domains import starting_volumes
from ideal.equilibrium import Update, update
from ideal.influence.table import InfluenceTable
from service.outcome import Iteration, Outcome
from service.runs.mixtures import Mixtures
from service.runs.runner import Runner, side_by_side
from service.stages.influence import Influence
from service.store.layout import TABLE
from service.store.stage import Identified


def optimise(config: Config, run: Runner, happened: Callable[[Outcome], None] = lambda outcome: None) -> Outcome:
    """Optimise the mixture.

    Args:
        happened: called with the outcome so far after every change of it.

    Raises:
        BadInput: something in the config or the data doesn't hold.
    """
    mixtures, settings = Mixtures(config, run, happened), config.equilibrium
    current, m = mixtures.train(0, starting_volumes(config, mixtures.data.result), None), settings.m
    reason = f"all {settings.iterations} iterations done"
    for number in range(1, settings.iterations + 1):
        _influence_and_benchmark(mixtures, current)
        following = _improve(mixtures, current, number, m)
        if isinstance(following, str):
            reason = following
            break
        current, m = following
    mixtures.benchmark(current)
    return mixtures.end(reason)


def _improve(mixtures: Mixtures, current: Iteration, number: int, m: float) -> tuple[Iteration, float] | str:
    """The next accepted mixture and the m that led to it; why there is none, if the run is at its end."""
    config = mixtures.config.equilibrium
    for _ in range(config.retries + 1):
        best = mixtures.outcome.equilibrium
        step = _step(mixtures, current, m)
        current.update = current.update or step
        if not step.told(config.sure):
            return "no domain's influence is told from 0: larger sets would be needed"
        if step.change(list(current.volumes.values())) < config.tolerance:
            return f"no volume would change by {config.tolerance:.1%}"
        following = mixtures.train(number, dict(zip(current.volumes, step.volumes, strict=True)), m)
        if following.loss <= best.loss * (1 + config.max_rise):
            current.update = step
            return following, m
        following.accepted = False
        mixtures.benchmark(following)
        current, m = best, m / 2
    return f"the reference loss rose, down to m = {m * 2:g}: D{current.number} is kept"


def _step(mixtures: Mixtures, current: Iteration, m: float) -> Update:
    config, table = mixtures.config, current.table
    assert table is not None
    kind = config.equilibrium.objective
    found = [mixtures.data.result[domain] for domain in current.volumes]
    cloud = table.resampled(config.influence.resamples, config.seed, config.influence.widening)
    return update(
        table.objective(table.matrix(), kind),
        table.objective(cloud, kind),
        table.objective(table.crowding, kind),
        list(current.volumes.values()),
        [each["pool"] for each in found],
        [each["tokens_per_example"] for each in found],
        config.equilibrium,
        m,
        config.influence.confidence,
    )


def _influence_and_benchmark(mixtures: Mixtures, current: Iteration) -> None:
    """Both read the same checkpoint: at the same time where the cluster has room."""
    calls = [partial(_influence, mixtures, current), partial(mixtures.benchmark, current)]
    side_by_side(calls, 2 if mixtures.run.at_once.with_influence else 1)


def _influence(mixtures: Mixtures, current: Iteration) -> None:
    config = mixtures.config
    stage = Influence(
        influence=Identified(config.influence, config.influence.of_the_table()),
        lora=config.sft.lora,
        volumes=current.volumes,
        seed=config.seed,
        model=current.sft,
        data=mixtures.data,
    )
    current.influence = mixtures.run(stage, f"{current.name} influence")
    current.table = InfluenceTable.load(current.influence.folder / TABLE)
