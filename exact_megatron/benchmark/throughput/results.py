"""From the times of a cell's arms to ratios with intervals, and the table with the bars."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...utils import bootstrap
from ..harness import RESAMPLES, SEED, Row, interval
from .cells import Cell, Result

SPEED_BAR, MEMORY_BAR = 0.998, 1.01
COMPARED = {  # own arm, reference arm
    "EXACT against baseline": ("exact", "baseline"),
    "masked against causal": ("baseline", "causal"),
}


def compare_arms(result: Result) -> None:
    """Add to a cell's result the ratios of its arms: medians over the pairs of blocks, with 95 % intervals."""
    arms = result["arms"]
    for name, (own, reference) in COMPARED.items():
        speed = np.array(arms[reference]["block s"]) / np.array(arms[own]["block s"])
        result[name] = {"ratio": float(np.median(speed)), "interval": interval(speed)}
        if arms[own]["block GiB"]:
            used = np.array(arms[own]["block GiB"]) / np.array(arms[reference]["block GiB"])
            result[name]["memory"] = {"ratio": float(np.median(used)), "interval": interval(used)}


def speed_against(own: Result, other: Result) -> tuple[float, tuple[float, float]]:
    """Speed of one cell's exact arm over another's, measured one after the other: ratio of the medians, 95 % interval by bootstrap."""
    rng = np.random.default_rng(SEED)

    def medians(result: Result) -> np.ndarray:
        values = np.array(result["arms"]["exact"]["block s"]) / result["step tokens"]
        return bootstrap.medians(values, RESAMPLES, rng)

    bounds = bootstrap.interval(medians(other) / medians(own))
    speeds = (result["arms"]["exact"]["tokens/s"] for result in (own, other))
    return next(speeds) / next(speeds), bounds


def rows_of(results: Sequence[Result]) -> list[Row]:
    """The table: speed and memory of EXACT against the bars, and beside them what masking and FP8 give."""
    rows = []
    for result in results:
        cell = Cell.of(result)
        rows += [row for name in COMPARED for row in _arm_rows(cell, result, name)]
        for other in results:
            same = Cell.of(other).model == cell.model and other["layers"] == result["layers"]
            if cell.fp8 and other["precision"] == "bf16" and same:
                speeds = result["arms"]["exact"]["tokens/s"], other["arms"]["exact"]["tokens/s"]
                ratio, bounds = speed_against(result, other)
                rows.append(Row(f"{cell}: FP8 against bf16", *speeds, "tokens/s", ratio, "", True, bounds))
    return rows


def _arm_rows(cell: Cell, result: Result, name: str) -> list[Row]:
    """One comparison of COMPARED: the speed, and for EXACT on a GPU the memory; only EXACT has bars."""
    own, reference = (result["arms"][arm] for arm in COMPARED[name])
    barred = COMPARED[name][0] == "exact"
    ratio, bounds = result[name]["ratio"], tuple(result[name]["interval"])
    speeds = own["tokens/s"], reference["tokens/s"]
    said = f"ratio >= {SPEED_BAR}" if barred else ""
    rows = [Row(f"{cell}: {name}", *speeds, "tokens/s", ratio, said, not barred or ratio >= SPEED_BAR, bounds)]
    if barred and "memory" in result[name]:
        ratio, bounds = result[name]["memory"]["ratio"], tuple(result[name]["memory"]["interval"])
        used = own["peak GiB"], reference["peak GiB"]
        said = f"ratio <= {MEMORY_BAR}"
        rows.append(Row(f"{cell}: memory", *used, "GiB", ratio, said, ratio <= MEMORY_BAR, bounds))
    return rows
