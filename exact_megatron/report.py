"""Tables and pictures of where supervision goes before and after EXACT.

No torch, no megatron; matplotlib and rich are imported where they are used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .allocation import WeightTable
from .exposure import ExposureCensus

COLORS = {"baseline": "#7d8793", "exact": "#d9541e"}
TAIL_SHADE, TAIL_LINE = "#fbeee6", "#6b4027"

Row = Mapping[str, Any]


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
    config, tail, rows = table.config, table.tail, table.rows()
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
        ValueError: matplotlib cannot write this kind of file.
    """
    assert table.config.tau is not None
    draw_census(table.rows(), table.config.tau, path)


def draw_census(rows: Sequence[Row], tau: int, path: str | os.PathLike[str]) -> None:
    """Draw what `plot_census` draws from the rows of a weight table (`table.rows()`, `exact/weights.json`).

    Args:
        rows: all buckets in order of context, with low, high, share, weight and weighted_share.
        tau: the buckets with low >= tau, in tokens, are the tail.
    """
    figure = new_figure(11.5, 5.2, f"Which targets the loss is made of, in a window of {rows[-1]['high']:,} tokens")
    tail = [row for row in rows if row["low"] >= tau]
    weighted, numbers = list(rows), False
    if 0 < len(tail) < len(rows):
        widths = [max(len(rows), 4), min(max(len(tail) * 1.5, 3.5), len(rows))]
        left, axes = figure.subplots(1, 2, width_ratios=widths)
        weighted, numbers = tail, len(tail) <= 4
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


def new_figure(width: float, height: float, title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=14)
    return figure


def plain_axes(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


def print_plan(plan: Mapping[str, Any]) -> None:
    """Print what `exact-megatron plan` found, stage by stage, and the sum of several stages."""
    from rich.console import Console

    console = Console(width=None if os.isatty(1) else 130, highlight=False)
    for stage in plan["stages"]:
        _print_stage(console, stage)
    if plan["measured"] and plan["measured"]["memory"]:
        _print_measured_memory(console, plan["measured"]["memory"])
    if len(plan["stages"]) > 1:
        columns = ["stage", "window", "steps", "tokens", "GiB of a GPU", "hours", "GPU hours"]
        table = _numbers(f"{len(plan['stages'])} stages", columns)
        for s in plan["stages"]:
            gib = f"{s['memory']['largest_gib']:.1f}" + ("" if s["memory"]["fits"] else " too much")
            cells = [f"{s['seq_length']:,}", f"{s['steps']:,}", f"{s['tokens']:,}", gib, _digits(s["hours"])]
            table.add_row(s["name"], *cells, _digits(s["gpu_hours"]))
        total = sum(s["tokens"] for s in plan["stages"])
        table.add_row("all", "", "", f"{total:,}", "", _digits(plan["hours"]), _digits(plan["gpu_hours"]))
        console.print(table)


def _print_stage(console: Any, stage: Mapping[str, Any]) -> None:
    layout, memory, gib = stage["layout"], stage["memory"], 2**30
    say = lambda text: console.print(text, soft_wrap=True)
    devices = "CPU ranks" if stage["accelerator"] == "cpu" else "GPUs"
    virtual = f" x {layout['virtual_pipeline']} virtual" if layout["virtual_pipeline"] else ""
    console.rule(f"{stage['name']}: {stage['parameters']:,} parameters, window {stage['seq_length']:,}")
    say(
        f"{layout['nodes']} x {layout['gpus_per_node']} {devices}: tensor {layout['tensor']}"
        f"{' with sequence parallelism' if layout['sequence_parallel'] else ''}, pipeline {layout['pipeline']}{virtual}, "
        f"context {layout['context']}, data {layout['data']}. {stage['precision']}, recomputation {layout['recomputation']}. "
        f"{layout['micro_batches']} micro-batches of {layout['micro_batch_size']} a step"
        + (f", {percent(layout['bubble'])} of a step is pipeline bubble." if layout["pipeline"] > 1 else ".")
    )
    for note in stage["notes"]:
        say(f"note: {note}")

    names = ["weights", "gradients", "optimizer", "activations", "logits", "working", "overhead", "total"]
    table = _numbers("memory of each rank in GiB, estimated", ["pipeline stage", "parameters", *names])
    for part in memory["stages"]:
        table.add_row(str(part["stage"]), f"{part['parameters']:,}", *(f"{part[n] / gib:.2f}" for n in names))
    console.print(table)
    limit = (
        ""
        if memory["gpu_gib"] is None
        else f" of {memory['gpu_gib']:g} GiB: " + ("fits." if memory["fits"] else "TOO MUCH.")
    )
    say(
        f"Largest: stage {memory['largest_stage']}, {memory['largest_gib']:.1f} GiB{limit} Most of it: {memory['largest_part']}."
        + (
            ""
            if memory["fits"]
            else " Recompute activations, split the model or the window over more GPUs, or shrink the micro-batch."
        )
    )
    say(
        f"{stage['steps']:,} steps of {stage['tokens_per_step']:,} tokens: {stage['samples']:,} samples, {stage['tokens']:,} tokens."
    )
    if stage["data"] is None:
        missing = ", ".join(f"{prefix}.idx" for prefix in stage["data_missing"])
        say(f"Data: not there yet ({missing}): no epochs, no tail, and attention counted over the full window.")
    else:
        table = _numbers("training data", ["source", "share", "documents", "tokens", "epochs"])
        for row in stage["data"]:
            cells = [percent(row["share"]), f"{row['documents']:,}", f"{row['tokens']:,}", f"{row['epochs']:.3f}"]
            table.add_row(row["prefix"], *cells)
        console.print(table)
    exact = stage["exact"]
    if exact:
        weights = ", ".join(f"{b['low']}+: {b['weight']:.4f}" for b in exact["buckets"] if b["low"] >= exact["tau"])
        say(
            f"EXACT ({'on' if exact['enabled'] else 'off in this arm'}; tau {exact['tau']:,}, alpha {exact['alpha']:g}, gamma "
            f"{exact['gamma']:g}): the tail has {percent(exact['tail_share'])} of the targets, {percent(exact['weighted_tail_share'])} of "
            f"the loss mass. Weights {weights}; below {exact['buckets'][0]['weight']:.4f}. Documents in stored order."
        )
    flops, speed = stage["flops_per_token"], stage["speed"]
    say(
        f"{flops['total'] / 1e9:,.2f} GFLOP a token, {percent(flops['attention'] / flops['total'])} of it attention "
        f"({flops['counted']}: {flops['keys_seen']:,.0f} keys a query)."
    )
    if speed is None:
        say("No time: give --mfu, --tokens-per-second-per-gpu or --measured.")
        return
    mfu = "" if speed["mfu"] is None else f", MFU {percent(speed['mfu'])} of {speed['peak_tflops']:,g} TFLOP/s"
    say(
        f"{speed['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU, {speed['tokens_per_second']:,.0f} in all "
        f"({speed['tflops_per_gpu']:,.1f} TFLOP/s a GPU{mfu}; {speed['source']}): {_digits(stage['hours'])} hours, "
        f"{_digits(stage['gpu_hours'])} GPU hours."
    )


def _print_measured_memory(console: Any, rows: Sequence[Row]) -> None:
    table = _numbers("memory of the measured run in MiB: estimate, measured", ["pipeline stage", *list(rows[0])[1:]])
    for row in rows:
        pairs = [", ".join(_digits(value / 2**20) for value in row[name]) for name in list(row)[1:]]
        table.add_row(str(row["stage"]), *pairs)
    console.print(table)


def _numbers(title: str, columns: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


def _digits(value: float | None) -> str:
    return "not known" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
