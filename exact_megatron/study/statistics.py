"""Paired differences between arms over training runs. A run is the unit: items of one run share its weights and are no repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Paired:
    """Differences arm - baseline, one a pair of runs from the same base on the same data.

    Attributes:
        mean: of the differences.
        half_width: of its 95 % interval by Student's t; None for a single pair.
        pairs: number of differences.
        same_sign: how many have the mean's sign.
        p: two-sided, of a mean of 0; None for a single pair, or where all differences are equal.
    """

    mean: float
    half_width: float | None
    pairs: int
    same_sign: int
    p: float | None

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def paired(differences: Sequence[float]) -> Paired:
    """Mean and interval of the differences of the pairs.

    Raises:
        ValueError: none, or one that is not finite.
    """
    from scipy import stats

    values = np.asarray(differences, np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"differences of pairs of runs must be finite numbers, at least one, not {differences}")
    mean = float(values.mean())
    same = int((np.sign(values) == np.sign(mean)).sum())
    if len(values) == 1:
        return Paired(mean, None, 1, same, None)
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    half_width = float(stats.t.ppf(0.975, len(values) - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, len(values) - 1)) if error else None
    return Paired(mean, half_width, len(values), same, p)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """P values corrected for being several (Holm 1979); None stays None and does not count."""
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[i] = largest
    return corrected
