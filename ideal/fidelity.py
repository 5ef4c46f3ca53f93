"""How well influence predicts what retraining does: the moves, the two sides of the comparison, and its measures.

Every domain's volume is moved up and down and the model trained again, with everything else as it was: the same seed,
the same draws of the other examples, in the same order. The actual value of a domain is the central difference

    dQ_r/dβ_j ≈ (Q_r(v_j(1+δ)) − Q_r(v_j(1−δ))) / 2δ,

and influence predicts it from one training, with a_jr per token, w_j the domain's share of the supervised tokens, and c
the dilution (``ideal.equilibrium``):

    steps    the total, and so the number of steps, is kept; the other domains make room in proportion:
             dQ_r/dβ_j = −Σ_k w_k u_k (a_kr − c·ā_r),     u_j = 1,  u_k = −v_j/(V − v_j)
    epochs   the other domains stay, and training is longer by the new examples:
             dQ_r/dβ_j = −w_j (a_jr − c·ā_r) − c (v_j/V) ā_r

Uncentred, both are the paper's −w_j a_jr.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ideal.equilibrium import token_weights
from ideal.influence import Array
from ideal.mixture import round_volumes, seeded

MODES = ("steps", "epochs")


def moved(volumes: Mapping[str, int], domain: str, change: float, mode: str) -> dict[str, int]:
    """The volumes with one domain's changed by this share.

    Args:
        mode: `steps` keeps the total, `epochs` the other volumes.
    """
    own = round(volumes[domain] * (1 + change))
    if mode == "epochs":
        return {**volumes, domain: own}
    total = sum(volumes.values())
    others = {name: v for name, v in volumes.items() if name != domain}
    room = total - own
    shrunk = round_volumes([v * room / sum(others.values()) for v in others.values()], room)
    return {**dict.fromkeys(volumes, 0), **dict(zip(others, shrunk, strict=True)), domain: own}


def predicted(
    influence: Array, volumes: Mapping[str, int], tokens: list[float], mode: str, dilution: float | None
) -> Array:
    """[..., M, R] dQ_r/dβ_j, nats per token.

    Args:
        influence: [..., M, R] a_jr.
        tokens: [M] mean supervised tokens of a domain's examples.
        dilution: c; None: uncentred.
    """
    v = np.array(list(volumes.values()), float)
    w = token_weights(list(volumes.values()), tokens)[:, None]
    if dilution is None:
        return np.asarray(-w * influence)
    diluted = dilution * (w * influence).sum(-2, keepdims=True)
    above = w * (influence - diluted)
    if mode == "epochs":
        return np.asarray(-above - (v / v.sum())[:, None] * diluted)
    makes_room = np.eye(len(v)) - (1 - np.eye(len(v))) * (v / (v.sum() - v))[:, None]
    return np.asarray(-makes_room @ above)


@dataclass(frozen=True)
class Measure:
    """A number with its bootstrap interval over seeds."""

    value: float
    low: float
    high: float


def pearson(x: Array, y: Array) -> float:
    return float(np.corrcoef(x.ravel(), y.ravel())[0, 1])


def spearman(x: Array, y: Array) -> float:
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: Array) -> Array:
    return np.argsort(np.argsort(x.ravel())).astype(float)


def cosine(x: Array, y: Array) -> float:
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def slope(x: Array, y: Array) -> float:
    """Actual by predicted, through the origin: 1 where the prediction has the right size."""
    return float((x * y).sum() / (x * x).sum())


MEASURES: dict[str, Callable[[Array, Array], float]] = {
    "pearson": pearson,
    "spearman": spearman,
    "cosine": cosine,
    "slope": slope,
}


def decided(actual: Array) -> Array:
    """[...] whether the seeds decide an entry's sign: its mean lies two standard errors from 0 or more.

    Args:
        actual: [S, ...] by seed.
    """
    error = actual.std(0, ddof=1) / np.sqrt(len(actual))
    return np.asarray(np.abs(actual.mean(0)) >= 2 * error)


def agreement(
    prediction: Array, actual: Array, seed: int, resamples: int = 1000, confidence: float = 0.9
) -> dict[str, Measure]:
    """How far the mean prediction agrees with the mean actual change, by every measure.

    ``signs`` is the share of right signs among the entries that the retrainings decide; ``single`` is what a run has,
    which predicts from one training: the mean Pearson correlation of one seed's prediction with the mean actual change.

    Args:
        prediction, actual: [S, ...] by seed; pairs are resampled together.
    """

    def signs(picks: npt.NDArray[np.int64]) -> float:
        right = np.sign(prediction[picks].mean(0)) == np.sign(actual.mean(0))
        return float(right[sure].mean()) if sure.any() else float("nan")

    sure = decided(actual)
    everything = np.arange(len(actual))
    draws = seeded(seed, "fidelity").integers(0, len(actual), (resamples, len(actual)))
    tail = (1 - confidence) / 2
    found = {}
    for name, measure in MEASURES.items():
        cloud = [measure(prediction[d].mean(0), actual[d].mean(0)) for d in draws]
        value = measure(prediction.mean(0), actual.mean(0))
        found[name] = Measure(value, *np.quantile(cloud, [tail, 1 - tail]).tolist())
    alone = np.array([pearson(one, actual.mean(0)) for one in prediction])
    found["single"] = Measure(float(alone.mean()), *np.quantile(alone[draws].mean(1), [tail, 1 - tail]).tolist())
    cloud = [signs(d) for d in draws]
    found["signs"] = Measure(signs(everything), *np.quantile(cloud, [tail, 1 - tail]).tolist())
    return found


def ceiling(actual: Array, seed: int, splits: int = 200) -> dict[str, Measure]:
    """How well two halves of the seeds predict each other: what no predictor can be expected to pass.

    Args:
        actual: [S, ...] by seed, S of 4 or more.

    Returns:
        `pearson` and `spearman`: mean over random halvings, with the middle 90 % of them.
    """
    random = seeded(seed, "ceiling")
    half = len(actual) // 2
    orders = [random.permutation(len(actual)) for _ in range(splits)]
    found = {}
    for name in ("pearson", "spearman"):
        cloud = [MEASURES[name](actual[o[:half]].mean(0), actual[o[half:]].mean(0)) for o in orders]
        found[name] = Measure(float(np.mean(cloud)), *np.quantile(cloud, [0.05, 0.95]).tolist())
    return found


def coverage(low: Array, high: Array, truth: Array) -> float:
    """Share of the intervals that hold the truth.

    Args:
        low, high: [S, ...] each seed's interval.
        truth: [...] the same for every seed.
    """
    return float(((low <= truth) & (truth <= high)).mean())


def widening(low: Array, value: Array, high: Array, truth: Array, level: float) -> tuple[float, float]:
    """By what factor intervals must grow on either side of their value, so that this share of them holds the truth.

    Args:
        low, value, high: [S, ...] each seed's interval and what it is about.
        truth: [...] the same for every seed.

    Returns:
        the factor; and the share that holds the truth where each seed's intervals grow by the other seeds' factor.
    """
    side = np.where(truth > value, high - value, value - low)
    needed = np.abs(truth - value) / np.maximum(side, np.finfo(float).tiny)
    others = [np.quantile(np.delete(needed, s, 0), level) for s in range(len(needed))]
    held = [(needed[s] <= factor).mean() for s, factor in enumerate(others)]
    return float(np.quantile(needed, level)), float(np.mean(held))
