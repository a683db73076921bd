"""What tables and pictures have in common: colours, formats of numbers, Markdown."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

COLORS = {"baseline": "#7d8793", "exact": "#d9541e"}
TAIL_SHADE, TAIL_LINE = "#fbeee6", "#6b4027"

Row = Mapping[str, Any]

PICTURES = (".png", ".svg", ".pdf")


def bucket_label(low: int, high: int) -> str:
    """Short name of a bucket for a picture: 512–1023, 1K–2K."""
    if low < 1024 or low % 1024:
        return f"{low}–{high}"
    return f"{low // 1024}K–{(high + 1) // 1024}K" if high % 1024 in (0, 1023) else f"{low // 1024}K–{high}"


def bucket_table(title: str, columns: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("")
    return table


def add_bucket(table: Any, row: Row, tau: int, *cells: str) -> None:
    mark = tail_mark(row, tau)
    table.add_row(
        f"{row['low']:,} - {row['high']:,}",
        f"{row['targets']:,}",
        *cells,
        mark,
        style="bold" if mark else None,
    )


def print_parts(*what: Any) -> None:
    """On standard output as it is now; not narrower than 100 columns where it is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 100))
    for part in what:
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))


def tail_mark(row: Row, tau: int) -> str:
    return "tail" if row["low"] >= tau else ""


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def picture_name(path: str | os.PathLike[str]) -> str:
    """The path, if its ending says what kind of picture to write; matplotlib adds an ending of its own to a name without one.

    Raises:
        ValueError: it does not end in .png, .svg or .pdf.
    """
    name = os.fspath(path)
    if os.path.splitext(name)[1].lower() not in PICTURES:
        raise ValueError(f"the picture {name!r} must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")
    return name


def new_figure(width: float, height: float, title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=14)
    return figure


def plain_axes(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


def markdown_table(rows: Iterable[Sequence[Any]], left: Collection[int] = (0,)) -> str:
    """A table of `rows`, the first of which is its head; columns are aligned to the right, but for those numbered in `left`."""
    head, *others = rows
    rule = ["---" if number in left else "---:" for number in range(len(head))]
    lines = ([str(cell).replace("|", "\\|") for cell in row] for row in (head, rule, *others))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
