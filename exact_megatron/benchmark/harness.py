"""How arms are timed in turn, compared and printed."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ExactError
from ..utils import bootstrap
from ..utils.environment import environment
from ..utils.files import write_text

SEED = 1234
RESAMPLES = 4000
FAILED, INTERRUPTED = "not measured", "interrupted"  # facts of a measurement that is not whole
_NOT_OPTIONS = ("command", "benchmark", "overrides", "json", "traceback")  # not of the measurement
_FRACTIONS = ("assume_mfu", "assume_start")


@dataclass(frozen=True)
class Row:
    """A median and its reference in `unit`, their ratio (and its 95 % interval), whether it keeps the bar ("": none)."""

    name: str
    own: float
    reference: float
    unit: str
    ratio: float
    bar: str
    passed: bool
    interval: tuple[float, ...] | None = None


Measured = tuple[dict[str, Any], list[Row]]  # facts, with "setup" among them, and the table


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; 1 when a bar is missed.

    `args.measure(args)` returns ({"setup": what was measured and how, in words, and more facts}, rows).

    Raises:
        ExactError, KeyboardInterrupt: parts failed, or SIGINT came; what was measured is printed and written all the same.
    """
    command = ["exact-megatron", "benchmark", args.benchmark]
    for name, value in vars(args).items():
        if value is None or name in _NOT_OPTIONS or callable(value):
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            command += [option] * value
            continue
        if isinstance(value, (int, float)) and value < 1 and name not in _FRACTIONS:
            raise ValueError(f"{option} {value} must be at least 1")
        command += [option, str(value)]
    load = os.getloadavg()[0]
    before = _cpu_seconds()
    facts, rows = args.measure(args)
    wall, busy, own = (now - then for now, then in zip(_cpu_seconds(), before))
    result = {
        "benchmark": args.benchmark,
        "command": shlex.join([*command, *getattr(args, "overrides", [])]),
        **facts,
        **environment(),
        "load average at the start": round(load, 2),
        "cores used by other processes": round(max(0.0, busy - own) / wall, 2),
        "rows": [asdict(row) for row in rows],
    }
    print_result(result, rows)
    if args.json:
        write_text(args.json, json.dumps(result, indent=1) + "\n")
    if INTERRUPTED in facts:
        raise KeyboardInterrupt
    if FAILED in facts:
        raise ExactError(f"{facts[FAILED]}. Everything else is measured")
    return 0 if all(row.passed for row in rows) else 1


@contextmanager
def written_at_interrupt(facts: dict[str, Any]) -> Iterator[None]:
    """End the block at SIGINT and note it in the measurement's facts, so that `run` writes what there is until then."""
    try:
        yield
    except KeyboardInterrupt:
        facts[INTERRUPTED] = "by SIGINT: what follows is not measured"


def _cpu_seconds() -> tuple[float, float, float]:
    """(wall clock, CPU time of all processes on the machine, CPU time of this one), in seconds."""
    ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]  # without idle and waiting for a disk
    return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def interleaved(arms: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds[rounds] of each arm, called with the round's number; the order is ABBA."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds):
        for name in list(arms)[:: 1 if i % 2 == 0 else -1]:
            started = time.perf_counter()
            arms[name](i)
            seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def compare_arms(name: str, own: np.ndarray, reference: np.ndarray, unit: str, limit: float) -> Row:
    medians = float(np.median(own)), float(np.median(reference))
    ratio = medians[0] / medians[1]
    return Row(name, *medians, unit, ratio, f"ratio <= {limit:g}", ratio <= limit)


def median_of_pairs(pairs: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Median and its 95 % interval."""
    return float(np.median(pairs)), interval(pairs)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the median, by bootstrap."""
    return bootstrap.interval(bootstrap.medians(values, RESAMPLES, np.random.default_rng(SEED)))


def print_result(result: dict[str, Any], rows: Sequence[Row]) -> None:
    """The table, and below it what was measured on what."""
    from rich.console import Console
    from rich.table import Table

    def number(value: float) -> str:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    table = Table(title=f"benchmark {result['benchmark']}")
    for heading in ("", "own", "reference", "unit", "ratio", "bar", "result"):
        table.add_column(heading, justify="right" if heading in ("own", "reference", "ratio") else "left")
    for row in rows:
        interval = " ({} to {})".format(*map(number, row.interval)) if row.interval else ""
        cells = row.name, number(row.own), number(row.reference), row.unit, number(row.ratio) + interval
        table.add_row(*cells, row.bar, "" if not row.bar else "passed" if row.passed else "MISSED")
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(table)
    for key in [key for key in result if key not in ("benchmark", "rows")]:
        value = result[key]
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        console.print(f"{key}: {text}", soft_wrap=True)
