"""Tables and pictures of a suite's results; matplotlib and rich are imported where they are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..reporting.style import markdown_table, new_figure, plain_axes, print_parts
from ..utils.bootstrap import LEVEL
from ..utils.files import write_text
from .bootstrap import RESAMPLES, Cell, Cells, Estimate, average, collect, estimate, resample
from .store import Metric

SHARE = "right answer preferred"  # the probe's cells that hold shares, beside nats


def metric_of(results: dict[str, Any]) -> Metric:
    return Metric(**results["metric"] | {"tasks": tuple(results["metric"]["tasks"])})


def averages(cells: Cells, metric: Metric, trained_length: int | None) -> dict[str, list[int]]:
    """Columns of the cells that each average is made of: "all", and with a trained length "trained" and "extrapolated";
    without those that hold nothing."""
    counted = [i for i, (task, _) in enumerate(cells.names) if not metric.tasks or task in metric.tasks]
    groups = {"all": counted}
    if trained_length is not None and any(cells.names[i][1] is not None for i in counted):
        inside = [i for i in counted if metric.trained(cells.names[i][1], trained_length)]
        groups |= {"trained": inside, "extrapolated": [i for i in counted if i not in inside]}
    return {name: columns for name, columns in groups.items() if columns}


def summarize(records: Sequence[dict[str, Any]], metric: Metric, trained_length: int | None) -> dict[str, Any]:
    """What results.json gives: cells and averages with their intervals.

    Returns:
        cells: [{task, length, value, low, high, units}], averages: {name: {value, low, high, units}}, both unscaled; low and
        high are None with too few units.
    """
    cells = collect(records)
    (samples,) = resample([cells])
    values = cells.values
    found = [estimate(values[i], samples[:, i], cells.units[i]) for i in range(len(cells.names))]
    means = {}
    for name, columns in averages(cells, metric, trained_length).items():
        mean = average(cells, columns, metric.pooled)
        means[name] = estimate(float(mean(values)), mean(samples), *cells.units_of(columns))
    return {
        "cells": [{"task": task, "length": length, **e.__dict__} for (task, length), e in zip(cells.names, found)],
        "averages": {name: e.__dict__ for name, e in means.items()},
        "interval": f"{LEVEL} %, percentiles of {RESAMPLES} bootstrap resamples of units",
    }


def grid(summary: dict[str, Any]) -> tuple[list[str], list[int | None], dict[Cell, Estimate]]:
    """Tasks, lengths in order, and the estimates of their cells."""
    found = {}
    for cell in summary["cells"]:
        found[(cell["task"], cell["length"])] = Estimate(cell["value"], cell["low"], cell["high"], cell["units"])
    tasks = list(dict.fromkeys(task for task, _ in found))
    lengths = sorted({length for _, length in found}, key=lambda n: -1 if n is None else n)
    return tasks, lengths, found


def number(e: Estimate | None, metric: Metric, signed: bool = False) -> str:
    """ "12.3 [10.1, 14.0]"; without the interval where there is none, and "" without an estimate."""
    if e is None or np.isnan(e.value):
        return ""
    digits = 1 if metric.scale == 100 else 3
    form = (lambda x: f"{x * metric.scale:+.{digits}f}") if signed else (lambda x: f"{x * metric.scale:.{digits}f}")
    return form(e.value) if e.low is None or e.high is None else f"{form(e.value)} [{form(e.low)}, {form(e.high)}]"


def length_label(length: int | None) -> str:
    return "all" if length is None else f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else f"{length:,}"


def table_rows(summary: dict[str, Any], metric: Metric) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a task or, where there is one task only, a length in each."""
    tasks, lengths, found = grid(summary)
    if len(tasks) > 5 or len(lengths) == 1:
        head = ["task", *map(length_label, lengths)]
        rows = [[task, *(number(found.get((task, n)), metric) for n in lengths)] for task in tasks]
    else:
        head = [metric.length, *tasks, "units"]
        units = {n: max(found[c].units for c in found if c[1] == n) for n in lengths}
        rows = [
            [length_label(n), *(number(found.get((t, n)), metric) for t in tasks), f"{units[n]:,}"] for n in lengths
        ]
    return head, rows


def average_lines(summary: dict[str, Any], metric: Metric) -> list[str]:
    return [
        f"{name} ({e['units']:,} units): {number(Estimate(**e), metric)}" for name, e in summary["averages"].items()
    ]


def write_suite_report(folder: Path, results: dict[str, Any], quiet: bool = False) -> None:
    """Print the table of a suite, and write report.md and curve.png into its folder."""
    metric = metric_of(results)
    summary = results["summary"]
    head, rows = table_rows(summary, metric)
    heading = f"{metric.title}: {metric.name}"
    lines = [f"Average {line}" for line in average_lines(summary, metric)]
    lines += [f"{key}: {value}" for key, value in results.get("scores", {}).items()]
    lines += [f"In brackets: {summary['interval']}; none with too few units."]
    text = [f"# {heading}", "", f"Model: {results['model']['path']} ({results['model']['kind']})", ""]
    text += [markdown_table([head, *rows]), "", *(f"* {line}" for line in lines)]
    text += ["", *(f"* Note: {note}" for note in results["notes"])]
    settings = ", ".join(f"{key} {value}" for key, value in results["settings"].items())
    text += [
        "",
        f"Settings: {settings}",
        "",
        f"{results['date']}, {results['CPU']}, GPU {results['GPU']}, {results['versions']}",
    ]
    write_text(folder / "report.md", "\n".join(text) + "\n")
    picture = plot_curves(folder / "curve.png", summary, metric)
    if not quiet:
        from rich.table import Table

        table = Table(title=heading)
        for name in head:
            table.add_column(name, justify="left" if name == "task" else "right")
        for row in rows:
            table.add_row(*row)
        print_parts(table, *lines, *(f"Note: {note}" for note in results["notes"]), f"report: {folder / 'report.md'}")
        if picture:
            print_parts(f"picture: {folder / 'curve.png'}")


def plot_curves(path: Path, summary: dict[str, Any], metric: Metric) -> bool:
    """Values over length, a line a task with its intervals as a band; of more than four tasks only their mean. Nothing is
    drawn, and False returned, where there are fewer than two lengths."""
    tasks, lengths, found = grid(summary)
    known = [n for n in lengths if n is not None]
    if len(known) < 2:
        return False
    figure = new_figure(9, 5, metric.title)
    axes = figure.subplots()
    x = [max(n, 4) for n in known]  # the first bucket of contexts begins at 0, which a logarithm has no place for
    if len(tasks) > 4:
        means = [np.mean([e.value for (_, n), e in found.items() if n == length]) for length in known]
        axes.plot(x, metric.scale * np.array(means), "o-", label=f"mean of {len(tasks)} tasks")
    for task in tasks if len(tasks) <= 4 else []:
        cells = [found.get((task, n), Estimate(float("nan"), None, None, 0)) for n in known]
        if task == SHARE:  # another unit than the others
            continue
        (line,) = axes.plot(x, [metric.scale * e.value for e in cells], "o-", label=task, markersize=4)
        low, high = (
            [np.nan if (v := getattr(e, side)) is None else metric.scale * v for e in cells] for side in ("low", "high")
        )
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [length_label(n) for n in known])
    axes.set_xlabel(f"{metric.length} (tokens)")
    axes.set_ylabel(metric.name)
    plain_axes(axes)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
    return True
