"""Two models on the same items: paired differences with bootstrap intervals, as Markdown, CSV and a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reporting.style import COLORS, markdown_table, new_figure, plain_axes, print_parts
from ..utils.bootstrap import LEVEL
from ..utils.files import changed_settings, write_text
from .bootstrap import MIN_UNITS, RESAMPLES, Estimate, average, collect, estimate, resample
from .report import averages, length_label, metric_of, number
from .store import Metric, read_results

NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True)
class Row:
    """A cell (task, length) or an average (task "average", length its name) of both models, and B - A; unscaled."""

    suite: str
    task: str
    length: int | str | None
    a: float
    b: float
    difference: Estimate

    def verdict(self, metric: Metric) -> str:
        """ "B better", "A better", or NO_DIFFERENCE where the interval holds zero or there are too few units for one."""
        if not self.difference.differs:
            return NO_DIFFERENCE
        return "B better" if (self.difference.value > 0) == metric.higher_is_better else "A better"


@dataclass(frozen=True)
class Pair:
    """A suite of both models."""

    suite: str
    metric: Metric
    rows: list[Row]
    means: dict[str, Row]
    notes: list[str]


def compare(
    a: str, b: str, output: str, trained_length: int | None, names: Sequence[str], quiet: bool = False
) -> list[Pair]:
    """Compare every suite that both folders hold, and write report.md, comparison.csv and comparison.png into `output`.

    Args:
        a, b: --output folders of `exact-megatron evaluate`, or DIR/SUITE of one.
        trained_length: None takes the one that A and B were evaluated with.
        names: of A and B.

    Raises:
        ValueError: no suite in both, an unfinished suite, or other items.
    """
    found_a, found_b = _suites(Path(a)), _suites(Path(b))
    shared = [suite for suite in found_a if suite in found_b]
    if not shared:
        raise ValueError(
            f"{a} holds {', '.join(found_a) or 'no suite'}, {b} holds {', '.join(found_b) or 'none'}: nothing in both"
        )
    pairs = [compare_suite(found_a[s], found_b[s], trained_length) for s in shared]
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.md", report(pairs, names, a, b))
    write_csv(folder / "comparison.csv", pairs)
    plot(folder / "comparison.png", pairs, names)
    if not quiet:
        for pair in pairs:
            _print(pair, names)
        print_parts(f"report: {folder / 'report.md'}", f"picture: {folder / 'comparison.png'}")
    return pairs


def _suites(folder: Path) -> dict[str, Path]:
    if (folder / "results.json").is_file():
        return {folder.name: folder}
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: give what `exact-megatron evaluate --output` wrote")
    return {file.parent.name: file.parent for file in sorted(folder.glob("*/results.json"))}


def compare_suite(a: Path, b: Path, trained_length: int | None = None) -> Pair:
    """Pair the items of one suite.

    Raises:
        ValueError: the two were not measured on the same items.
    """
    (head_a, items_a), (head_b, items_b) = read_results(a), read_results(b)
    missing = sorted(items_a.keys() ^ items_b.keys())
    if missing:
        raise ValueError(
            f"{a} and {b} differ in {len(missing)} items, {missing[0]!r} the first: evaluate both with the same settings"
        )
    other = [name for name in items_a if items_a[name]["hash"] != items_b[name]["hash"]]
    if other:
        changed = changed_settings(head_a["settings"], head_b["settings"])
        why = (
            f"; settings differ in {changed}"
            if changed
            else ": they may have been made by other tokenizers or from other data"
        )
        raise ValueError(f"{a} and {b}: item {other[0]!r} and {len(other) - 1} more are not the same{why}")
    metric = metric_of(head_a)
    if trained_length is None:
        lengths = {head.get("trained_length") for head in (head_a, head_b)}
        if len(lengths) > 1:
            raise ValueError(
                f"{a} and {b} were evaluated with different trained lengths {lengths}: give --trained-length"
            )
        (trained_length,) = lengths
    order = list(items_a)
    cells = [collect([items[name] for name in order]) for items in (items_a, items_b)]
    resampled = resample(cells)
    rows = [
        _row(a.name, task, length, [c.values[i] for c in cells], [r[:, i] for r in resampled], cells[0].units[i])
        for i, (task, length) in enumerate(cells[0].names)
    ]
    means = {}
    for name, columns in averages(cells[0], metric, trained_length).items():
        mean = average(cells[0], columns, metric.pooled)
        means[name] = _row(
            a.name,
            "average",
            name,
            [mean(c.values) for c in cells],
            [mean(r) for r in resampled],
            *cells[0].units_of(columns),
        )
    notes = [
        f"settings differ in {key}: A {one}, B {two}"
        for key, (one, two) in changed_settings(head_a["settings"], head_b["settings"]).items()
    ]
    if trained_length is not None:
        notes.append(
            f"trained: {metric.length} up to {trained_length:,}{'' if metric.inclusive else ', not including it'}"
        )
    return Pair(a.name, metric, rows, means, notes)


def _row(
    suite: str,
    task: str,
    length: Any,
    values: Sequence[Any],
    samples: Sequence[Any],
    units: Any,
    least: int | None = None,
) -> Row:
    one, two = (float(v) for v in values)
    return Row(suite, task, length, one, two, estimate(two - one, samples[1] - samples[0], int(units), least))


def difference_text(row: Row, metric: Metric) -> str:
    """ "+1.2 [+0.3, +2.0]" or, inside its interval, "no difference shown (+0.1 [-0.4, +0.6])"."""
    text = number(row.difference, metric, signed=True)
    return text if row.difference.differs else f"{NO_DIFFERENCE} ({text})"


def report(pairs: Sequence[Pair], names: Sequence[str], a: str, b: str) -> str:
    """The Markdown report: a summary in the form of the paper's main table, then every suite by task and length."""
    one, two = names
    head = [
        "benchmark",
        *(f"{column} {what}" for column in ("trained", "extrapolated") for what in (one, two, "difference")),
    ]
    rows = []
    for pair in pairs:
        cells = [
            f"{pair.metric.title}, {pair.metric.name}{'' if pair.metric.higher_is_better else ' (lower is better)'}"
        ]
        for column in ("trained", "extrapolated"):
            row = pair.means.get(column) or (
                pair.means.get("all") if column == "trained" and "extrapolated" not in pair.means else None
            )
            cells += (
                ["", "", ""]
                if row is None
                else [_plain(row.a, pair.metric), _plain(row.b, pair.metric), difference_text(row, pair.metric)]
            )
        rows.append(cells)
    lines = [
        f"# {two} compared with {one}",
        "",
        f"A is {one}, {a}. B is {two}, {b}. Differences are B - A on the same items.",
        "",
    ]
    lines.append(markdown_table([head, *rows]))
    lines += [
        "",
        f'In brackets: {LEVEL} % intervals, percentiles of {RESAMPLES} bootstrap resamples of the paired units. "{NO_DIFFERENCE}": the '
        f"interval holds zero, or there are fewer than {MIN_UNITS} units for one. Without lengths, or without a trained length, "
        "the average of everything stands in the first columns.",
    ]
    for pair in pairs:
        head = ["task", pair.metric.length, one, two, "difference", "units"]
        rows = [
            [
                row.task,
                row.length if isinstance(row.length, str) else length_label(row.length),
                _plain(row.a, pair.metric),
                _plain(row.b, pair.metric),
                difference_text(row, pair.metric),
                f"{row.difference.units:,}",
            ]
            for row in [*pair.rows, *pair.means.values()]
        ]
        lines += ["", f"## {pair.metric.title}", "", f"{pair.metric.name}.", *(f"{note}." for note in pair.notes), ""]
        lines.append(markdown_table([head, *rows]))
    return "\n".join([*lines, "", "![differences](comparison.png)", ""])


def _plain(value: float, metric: Metric) -> str:
    return number(Estimate(value, None, None, 0), metric)


def write_csv(path: Path, pairs: Sequence[Pair]) -> None:
    """One line a cell and average, unscaled."""
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["suite", "task", "length", "a", "b", "difference", "low", "high", "units", "verdict"])
        for pair in pairs:
            for row in [*pair.rows, *pair.means.values()]:
                d = row.difference
                length = "" if row.length is None else row.length
                out.writerow(
                    [
                        row.suite,
                        row.task,
                        length,
                        row.a,
                        row.b,
                        d.value,
                        d.low,
                        d.high,
                        d.units,
                        row.verdict(pair.metric),
                    ]
                )


def plot(path: Path, pairs: Sequence[Pair], names: Sequence[str]) -> None:
    """Differences with their intervals: one panel a suite, averages below the cells they are made of."""
    tall = max(len(pair.rows) + len(pair.means) for pair in pairs)
    figure = new_figure(6.0 * len(pairs) + 1, 1.6 + 0.28 * tall, f"{names[1]} - {names[0]} on the same items")
    panels = figure.subplots(1, len(pairs), squeeze=False)[0]
    for axes, pair in zip(panels, pairs):
        shown = [*pair.rows, *pair.means.values()]
        for y, row in enumerate(shown):
            d = row.difference
            scale = pair.metric.scale
            color = COLORS["exact"] if d.differs else COLORS["baseline"]
            if d.low is not None and d.high is not None:
                axes.plot([d.low * scale, d.high * scale], [y, y], color=color, linewidth=2)
            marker = "D" if row.task == "average" else "o"
            axes.plot(d.value * scale, y, marker, color=color, markersize=5)
        labels = [f"{r.task} {r.length if isinstance(r.length, str) else length_label(r.length)}" for r in shown]
        axes.set_yticks(range(len(shown)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.axvline(0, color="#333333", linewidth=0.8)
        better = "right" if pair.metric.higher_is_better else "left"
        axes.set_title(pair.metric.title, fontsize=12)
        axes.set_xlabel(f"difference; further {better} is better for {names[1]}\ngray: {NO_DIFFERENCE}", fontsize=9)
        plain_axes(axes)
    figure.savefig(path, dpi=130)


def _print(pair: Pair, names: Sequence[str]) -> None:
    from rich.table import Table

    table = Table(title=f"{pair.metric.title}: {pair.metric.name}")
    for column in ("task", pair.metric.length, *names, "difference"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for row in [*pair.rows, *pair.means.values()]:
        length = row.length if isinstance(row.length, str) else length_label(row.length)
        table.add_row(
            row.task, length, _plain(row.a, pair.metric), _plain(row.b, pair.metric), difference_text(row, pair.metric)
        )
    print_parts(table, *pair.notes)
