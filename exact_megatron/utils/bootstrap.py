"""The bootstrap: how far a statistic of a sample moves when its units are drawn again. numpy only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LEVEL = 95  # per cent
BLOCK = 100  # resamples at a time


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], units: int, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """A statistic of `resamples` samples of as many units, drawn with replacement.

    Args:
        statistic: from int64[r, units], how often each unit is in each of r resamples, to values [r, ...].

    Returns:
        [resamples, ...], the statistic of each resample.
    """
    even = np.full(units, 1 / units)
    sizes = [min(BLOCK, resamples - start) for start in range(0, resamples, BLOCK)]
    return np.concatenate([statistic(rng.multinomial(units, even, size)) for size in sizes])


def medians(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Medians float64[resamples] of resampled values [n]."""

    def of(times: np.ndarray) -> np.ndarray:
        return np.array([np.median(np.repeat(values, row)) for row in times])

    return bootstrap(of, len(values), resamples, rng)


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """Percentile interval at LEVEL of a resampled statistic float64[resamples]."""
    low, high = np.percentile(resampled, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)
