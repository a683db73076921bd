"""Means of cells (task, length) over items, and bootstrap intervals of them, of averages and of differences. numpy only.

A record gives its contribution to one or more cells as [task, length, sum, count]; a cell's value is the ratio of the two
sums over all records. Resampled are units: what was drawn independently (an item, a document, a needle), with everything
that was measured on it, so that an interval does not take 26 depths of one needle for 26 needles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..utils.bootstrap import bootstrap, interval

RESAMPLES = 2000
MIN_UNITS = 10  # below, percentiles of resampled means say little: no interval is given

Cell = tuple[str, int | None]


@dataclass(frozen=True)
class Cells:
    """Contributions of units to cells.

    Attributes:
        names: C cells (task, length), in order of first appearance.
        sums, counts: float64[U, C].
        strata: int64[U]; units are resampled inside their stratum.
    """

    names: list[Cell]
    sums: np.ndarray
    counts: np.ndarray
    strata: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """float64[C], NaN where a cell has no count."""
        return _ratio(self.sums.sum(0), self.counts.sum(0))

    @property
    def units(self) -> np.ndarray:
        """int64[C], units with a count in each cell."""
        return (self.counts > 0).sum(0)

    def units_of(self, columns: Sequence[int]) -> tuple[int, int]:
        """Units that contribute to `columns`, and those of the stratum with the fewest: one unit a stratum, resampled inside
        it, would seem to have no variance."""
        there = (self.counts[:, list(columns)] > 0).any(1)
        _, each = np.unique(self.strata[there], return_counts=True)
        return int(there.sum()), int(each.min())


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; `low` and `high` are None with fewer than MIN_UNITS units."""

    value: float
    low: float | None
    high: float | None
    units: int

    @property
    def differs(self) -> bool:
        """Whether the interval of a difference leaves out zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def collect(records: Sequence[dict[str, Any]]) -> Cells:
    """Sum records with `cells`, `unit` and (optional) `stratum` into Cells."""
    names: dict[Cell, int] = {}
    units: dict[tuple[str, str], int] = {}
    strata: dict[str, int] = {}
    for record in records:
        units.setdefault((record.get("stratum", ""), record["unit"]), len(units))
        strata.setdefault(record.get("stratum", ""), len(strata))
        for task, length, _, _ in record["cells"]:
            names.setdefault((task, length), len(names))
    sums, counts = np.zeros((len(units), len(names))), np.zeros((len(units), len(names)))
    for record in records:
        row = units[(record.get("stratum", ""), record["unit"])]
        for task, length, total, count in record["cells"]:
            column = names[(task, length)]
            sums[row, column] += total
            counts[row, column] += count
    return Cells(list(names), sums, counts, np.array([strata[s] for s, _ in units], np.int64))


def resample(parts: Sequence[Cells], seed: int = 0, resamples: int = RESAMPLES) -> list[np.ndarray]:
    """Values of each of `parts` float64[resamples, C] under the same draws of units: paired where there are two.

    Args:
        parts: Cells with the same units, strata and names.
    """
    rng = np.random.default_rng(seed)
    first = parts[0]
    tables = np.stack([table for part in parts for table in (part.sums, part.counts)])
    totals = np.zeros((resamples, *tables.shape[::2]))
    for stratum in np.unique(first.strata):
        rows = np.flatnonzero(first.strata == stratum)
        columns = np.flatnonzero(first.counts[rows].any(0))
        inside = tables[np.ix_(np.arange(len(tables)), rows, columns)]

        def sums(times: np.ndarray, inside: np.ndarray = inside) -> np.ndarray:
            return np.swapaxes(times.astype(float) @ inside, 0, 1)

        totals[:, :, columns] += bootstrap(sums, len(rows), resamples, rng)
    return [_ratio(totals[:, i], totals[:, i + 1]) for i in range(0, len(tables), 2)]


def average(cells: Cells, columns: Sequence[int], pooled: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Function from values [..., C] to their average [...] over `columns`: the plain mean of cells, or, `pooled`, weighted by
    how much each cell holds in the whole sample."""
    weights = cells.counts.sum(0)[list(columns)] if pooled else np.ones(len(columns))

    def of(values: np.ndarray) -> np.ndarray:
        chosen = values[..., list(columns)]
        there = ~np.isnan(chosen)
        return _ratio((np.where(there, chosen, 0) * weights).sum(-1), (there * weights).sum(-1))

    return of


def estimate(value: float, resampled: np.ndarray, units: int, least: int | None = None) -> Estimate:
    """`value` with the percentile interval of `resampled` float64[resamples]; `least` as of `Cells.units_of`."""
    seen = resampled[~np.isnan(resampled)]
    if min(units, units if least is None else least) < MIN_UNITS or not len(seen):
        return Estimate(float(value), None, None, int(units))
    return Estimate(float(value), *interval(seen), int(units))


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=np.asarray(counts) > 0)
