"""Tables and pictures of where supervision goes before and after EXACT.

No torch, no megatron; matplotlib and rich are imported where they are used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..allocation import WeightTable
from ..exposure import ExposureCensus
from .style import (
    COLORS,
    TAIL_LINE,
    TAIL_SHADE,
    Row,
    add_bucket,
    bucket_label,
    bucket_table,
    new_figure,
    percent,
    picture_name,
    plain_axes,
    print_parts,
)


def census_json(census: ExposureCensus, table: WeightTable) -> dict[str, Any]:
    """What `exact-megatron census --json` writes.

    Returns:
        seq_length and tau in tokens, samples, tokens, buckets: [{low, high (inclusive), targets, share,
        weight (as applied), weighted_share}], tail_share, weighted_tail_share, digest of the weight table,
        census_digest, and the settings alpha, gamma, eps, normalization, max_weight. Shares are fractions of
        all supervised targets, or of the sum of their weights. Where no target lies in the tail, tail_share is 0 and
        every weight 1.
    """
    config = table.config
    return {
        "seq_length": census.seq_length,
        "tau": config.tau,
        "samples": census.samples,
        "tokens": census.tokens,
        "buckets": table.rows(),
        "tail_share": table.tail_share,
        "weighted_tail_share": table.weighted_tail_share,
        "digest": table.digest,
        "census_digest": census.digest,
        "alpha": config.alpha,
        "gamma": config.gamma,
        "eps": config.eps,
        "normalization": config.normalization,
        "max_weight": config.max_weight,
    }


def print_census(census: ExposureCensus, table: WeightTable) -> None:
    """Print the census on standard output: a table with the tail marked, and a summary in words."""
    config = table.config
    tail = table.tail
    rows = table.rows()
    start = rows[tail[0]]["low"]
    out = bucket_table(
        f"Loss mass by effective context, window {census.seq_length:,} tokens",
        ["effective context", "targets", "share", "weight", "weighted share"],
    )
    for row in rows:
        add_bucket(out, row, start, percent(row["share"]), f"{row['weight']:.4f}", percent(row["weighted_share"]))
    out.add_section()
    out.add_row("all", f"{census.targets:,}", percent(1), f"{table.mean:.4f}", percent(1), "")

    below = "tau" if start == config.tau else f"the first bucket from tau = {config.tau:,} on"
    counts = np.array([rows[b]["targets"] for b in tail])
    if not counts.sum():
        longest = int(np.flatnonzero(census.counts)[-1])
        return print_parts(
            out,
            f"No target has an effective context of {start:,} tokens ({below}) or more; the longest seen is {longest:,}.",
            f"{census.samples:,} samples, {census.tokens:,} tokens. Census {census.digest}.",
        )
    budget = float(counts @ (table.bucket_weights[tail] - 1) / counts.sum())
    alpha = f"alpha {config.alpha:g}"
    if budget < config.alpha - 1e-6:
        alpha += f", capped by max_weight {config.max_weight:g}"
    before, after = percent(table.tail_share), percent(table.weighted_tail_share)
    lines = [
        f"{percent(census.share_below(start))} of the loss mass lies below l = {start:,} ({below}); "
        f"with the weights {percent(1 - table.weighted_tail_share)}.",
        f"The tail has {before} of the targets, and {after} of the loss mass with the weights.",
        f"Budget: {percent(budget)} more supervision for the tail's targets ({alpha}), shared out among its "
        f"buckets by inverse frequency (gamma {config.gamma:g}).",
        f"{census.samples:,} samples, {census.tokens:,} tokens. Census {census.digest}, weights {table.digest}.",
    ]
    if config.normalization == "corpus":
        mean = table.bucket_weights[0] / float(table.lookup[0])
        lines.insert(3, f"Weights are divided by their mean over the corpus, {mean:.6f}, so that the mean is 1.")
    print_parts(out, *lines)


def plot_census(census: ExposureCensus, table: WeightTable, path: str | os.PathLike[str]) -> None:
    """Draw the share of the loss by effective context, before and after weighting.

    Args:
        path: ends in .png, .svg or .pdf.

    Raises:
        ValueError: it does not.
    """
    assert table.config.tau is not None
    draw_census(table.rows(), table.config.tau, picture_name(path))


def draw_census(rows: Sequence[Row], tau: int, path: str | os.PathLike[str]) -> None:
    """Draw what `plot_census` draws from the rows of a weight table (`table.rows()`, `exact/weights.json`).

    Args:
        rows: all buckets in order of context, with low, high, share, weight and weighted_share.
        tau: the buckets with low >= tau, in tokens, are the tail.
    """
    figure = new_figure(11.5, 5.2, f"Which targets the loss is made of, in a window of {rows[-1]['high']:,} tokens")
    tail = [row for row in rows if row["low"] >= tau]
    weighted = list(rows)
    numbers = False
    if 0 < len(tail) < len(rows):
        widths = [max(len(rows), 4), min(max(len(tail) * 1.5, 3.5), len(rows))]
        left, axes = figure.subplots(1, 2, width_ratios=widths)
        weighted = tail
        numbers = len(tail) <= 4
        before, after = (sum(row[key] for row in tail) for key in ("share", "weighted_share"))
        left.set_title(f"All targets: the tail's share goes from {percent(before)} to {percent(after)}", fontsize=12)
        _share_bars(left, rows)
        edge = len(rows) - len(tail) - 0.5
        left.axvspan(edge, len(rows) - 0.4, color=TAIL_SHADE, zorder=0)
        left.axvline(edge, color=TAIL_LINE, linewidth=1.2, linestyle="--")
        top = left.get_ylim()[1]
        left.set_ylim(0, top * 1.13)
        side = 1 if len(tail) * 2 >= len(rows) else -1  # where there is more room
        align = "left" if side > 0 else "right"
        left.text(edge + 0.1 * side, top * 1.11, f"tau = {tau:,}", va="top", ha=align, color=TAIL_LINE)
        axes.set_facecolor(TAIL_SHADE)
        axes.set_title(f"The tail, and its weights\n(all other targets: × {rows[0]['weight']:.3f})", fontsize=12)
    else:
        left = axes = figure.subplots()
    _share_bars(axes, weighted, numbers)
    left.set_ylabel("share of the loss (%)")
    left.set_xlabel("effective context of a target: how many tokens of its own document it can see")
    heights = [100 * max(row["share"], row["weighted_share"]) for row in weighted]
    axes.set_ylim(0, 1.3 * max(heights) or 1)
    for x, (row, height) in enumerate(zip(weighted, heights)):
        axes.annotate(
            f"× {row['weight']:.3f}" if numbers else f"{row['weight']:.2f}",
            (x, height),
            xytext=(0, 18 if numbers else 4),
            textcoords="offset points",
            ha="center",
            fontsize=11 if numbers else 8,
            fontweight="bold",
            color=COLORS["exact"],
        )
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)


def _share_bars(axes: Any, rows: Sequence[Row], numbers: bool = False) -> None:
    x = np.arange(len(rows))
    for shift, key, arm, label in (
        (-0.2, "share", "baseline", "before: every target counts the same"),
        (0.2, "weighted_share", "exact", "after: with the EXACT weights"),
    ):
        bars = axes.bar(x + shift, [100 * row[key] for row in rows], 0.38, color=COLORS[arm], label=label, zorder=2)
        if numbers:
            axes.bar_label(bars, fmt="%.1f %%", fontsize=9, padding=2)
    labels = axes.set_xticks(x, [bucket_label(row["low"], row["high"]) for row in rows])
    if len(rows) > 5:
        for tick in labels:
            tick.label1.set(rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(rows) - 0.4)
    plain_axes(axes)
