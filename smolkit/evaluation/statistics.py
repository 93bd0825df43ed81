"""Confidence intervals and paired tests, from the items that a figure is made of.

Everything here is for one run or pair of runs on a fixed set of items: it says how far the figure could move with
other items of the same kind, not with another training seed. Bootstraps draw from a fixed seed: same items, same
limits.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2_000
_CELLS = 2**20  # indices drawn at a time: 8 MiB, whatever the number of items


def wilson(successes: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927; recommended by Brown, Cai and DasGupta 2001): unlike p ± z·se it stays
    within 0 and 1 and has a width at 0 and 100 %."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, z2 = successes / count, z * z
    centre = share + z2 / (2 * count)
    margin = z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    low, high = (centre - margin) / (1 + z2 / count), (centre + margin) / (1 + z2 / count)
    return (0.0 if successes == 0 else low), (1.0 if successes == count else high)  # exact, not to 1e-17


def bootstrap(
    numerators: Sequence[float], denominators: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Percentile interval (Efron and Tibshirani 1993, chapter 13) of sum(numerators) / sum(denominators) over items
    drawn with replacement; with denominators of 1 it is the interval of a mean."""
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    ratios = _draws(len(above), lambda drawn: above[drawn].sum(1) / below[drawn].sum(1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p-value that two runs differ on the same yes-or-no items (McNemar 1947): of the items on which
    they disagree, `better` and `worse` ones, half should go either way."""
    disagreeing, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(disagreeing, k) for k in range(fewer + 1)) / 2**disagreeing
    return min(1.0, 2 * tail)


def paired_bootstrap(
    first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]
) -> tuple[float, float, float]:
    """(low, high, p) of the difference second − first of two ratios of sums over the same items, as
    (numerator, denominator): both runs are resampled by the same draws (Koehn 2004). p is twice the share of draws on
    the other side of zero, at least 1 / RESAMPLES."""
    assert len(first) == len(second), "paired items"
    (n1, d1), (n2, d2) = (np.asarray(run, float).T for run in (first, second))

    def difference(drawn: np.ndarray) -> np.ndarray:
        return n2[drawn].sum(1) / d2[drawn].sum(1) - n1[drawn].sum(1) / d1[drawn].sum(1)

    differences = _draws(len(first), difference)
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    other_side = min((differences <= 0).mean(), (differences >= 0).mean())
    return float(low), float(high), float(min(1.0, max(2 * other_side, 1 / RESAMPLES)))


def _draws(items: int, figure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`figure` of RESAMPLES draws of `items` items with replacement; it gets the drawn indices (R, items), in parts."""
    generator = np.random.default_rng(0)
    step = max(1, _CELLS // items)
    sizes = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    return np.concatenate([figure(generator.integers(items, size=(size, items))) for size in sizes])
