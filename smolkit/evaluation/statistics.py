"""Confidence intervals and paired tests, from the items that a figure is made of.

They are SciPy's, whose `stats` is loaded on first use: whoever writes a model card comes by here.

Everything here is for one run or pair of runs on a fixed set of items: it says how far the figure could move with
other items of the same kind, not with another training seed. Bootstraps draw from a fixed seed: same items, same
limits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy

CONFIDENCE = 0.95
RESAMPLES = 2_000
_CELLS = 2**20  # indices drawn at a time: 8 MiB, whatever the number of items


def wilson(successes: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927; recommended by Brown, Cai and DasGupta 2001): unlike p ± z·se it stays
    within 0 and 1 and has a width at 0 and 100 %."""
    interval = scipy.stats.binomtest(successes, count).proportion_ci(confidence, method="wilson")
    low, high = float(interval.low), float(interval.high)
    return (0.0 if successes == 0 else low), (1.0 if successes == count else high)  # exact, not to 1e-17


def bootstrap(
    numerators: Sequence[float], denominators: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Percentile interval (Efron and Tibshirani 1993, chapter 13) of sum(numerators) / sum(denominators) over items
    drawn with replacement; with denominators of 1 it is the interval of a mean."""
    low, high, _ = _resampled((numerators, denominators), lambda n, d, axis: n.sum(axis) / d.sum(axis), confidence)
    return low, high


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p-value that two runs differ on the same yes-or-no items (McNemar 1947): of the items on which
    they disagree, `better` and `worse` ones, half should go either way."""
    return float(scipy.stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def paired_bootstrap(
    first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]
) -> tuple[float, float, float]:
    """(low, high, p) of the difference second − first of two ratios of sums over the same items, as
    (numerator, denominator): both runs are resampled by the same draws (Koehn 2004). p is twice the share of draws on
    the other side of zero, at least 1 / RESAMPLES."""
    assert len(first) == len(second), "paired items"
    columns = (*zip(*first, strict=True), *zip(*second, strict=True))

    def difference(n1: np.ndarray, d1: np.ndarray, n2: np.ndarray, d2: np.ndarray, axis: int) -> np.ndarray:
        return n2.sum(axis) / d2.sum(axis) - n1.sum(axis) / d1.sum(axis)

    low, high, differences = _resampled(columns, difference, CONFIDENCE)
    other_side = min((differences <= 0).mean(), (differences >= 0).mean())
    return low, high, float(min(1.0, max(2 * other_side, 1 / RESAMPLES)))


def _resampled(
    columns: Sequence[Sequence[float]], figure: Callable[..., Any], confidence: float
) -> tuple[float, float, np.ndarray]:
    """Percentile interval of `figure` over items drawn with replacement, and its RESAMPLES values. One item has no
    other to be drawn: the interval is its value."""
    data = [np.asarray(column, float) for column in columns]
    count = len(data[0])
    if count == 1:
        value = float(figure(*data, axis=-1))
        return value, value, np.full(RESAMPLES, value)
    found = scipy.stats.bootstrap(
        data,
        figure,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=max(1, _CELLS // count),
        confidence_level=confidence,
        rng=np.random.default_rng(0),
    )
    interval = found.confidence_interval
    return float(interval.low), float(interval.high), found.bootstrap_distribution
