"""Report of a paired comparison of baseline and EXACT: report.md, tables and pictures."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..utils.files import write_text
from .census import draw_census
from .comparison import ARMS, Comparison, read_comparison
from .style import (
    COLORS,
    TAIL_LINE,
    TAIL_SHADE,
    Row,
    add_bucket,
    bucket_label,
    bucket_table,
    markdown_table,
    new_figure,
    percent,
    plain_axes,
    print_parts,
    tail_mark,
)


def write_report(comparison_dir: str | os.PathLike[str], quiet: bool = False) -> Path:
    """Write report.md, heldout.png, training.png and census.png into `comparison_dir`.

    Args:
        quiet: do not print the losses and speeds on standard output.

    Returns:
        The path of report.md.

    Raises:
        FileNotFoundError, ValueError: see read_comparison.
    """
    folder = Path(comparison_dir)
    result = read_comparison(folder)
    draw_held_out(result, folder / "heldout.png")
    draw_training(result, folder / "training.png")
    draw_census(result.weights["buckets"], result.tau, folder / "census.png")
    path = folder / "report.md"
    write_text(path, _markdown(result))
    if not quiet:
        print_comparison(result)
        print_parts(f"Report: {path}")
    return path


def print_comparison(result: Comparison) -> None:
    """Print held-out losses and speeds of both arms on standard output."""
    out = bucket_table(
        f"Held-out loss by effective context, window {result.window:,} tokens",
        ["effective context", "targets", *ARMS.values(), "difference"],
    )
    for row in result.losses():
        add_bucket(out, row, result.tau, *_losses(row))
    out.add_section()
    total = result.total()
    out.add_row("all", f"{total['targets']:,}", *_losses(total), "")
    print_parts(
        out,
        "Losses are unweighted, in nats per target, on the same samples in both arms.",
        result.speed(),
        "One seed of one run: it cannot tell whether a difference is more than chance (see the report).",
    )


def draw_held_out(result: Comparison, path: str | os.PathLike[str]) -> None:
    """Draw both arms' held-out loss by effective context, and the difference below."""
    rows = [row for row in result.losses() if row["difference"] is not None]
    figure = new_figure(9.5, 6.6, f"Held-out loss by effective context, window {result.window:,} tokens")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    x = np.arange(len(rows))
    for (arm, name), marker in zip(ARMS.items(), "os"):
        above.plot(x, [row[arm] for row in rows], marker=marker, markersize=5, color=COLORS[arm], label=name)
    above.set_ylabel("loss (nats per target)")
    above.legend(frameon=False, loc="upper right")
    differences = [row["difference"] for row in rows]
    bars = below.bar(x, differences, 0.55, color="#4a6fa5", zorder=2)
    below.bar_label(bars, [_signed(d) for d in differences], fontsize=9, padding=3)
    below.axhline(0, color="black", linewidth=0.8)
    low = min(0.0, *differences)
    high = max(0.0, *differences)
    room = 0.2 * (high - low) or 1e-3
    below.set_ylim(low - room, high + room)
    below.set_ylabel("EXACT − baseline\n(below 0: EXACT lower)")
    below.set_xticks(x, [f"{bucket_label(row['low'], row['high'])}\n{_count(row['targets'])}" for row in rows])
    below.set_xlabel("effective context of a target in tokens, and the number of held-out targets that have it")
    edge = sum(row["low"] < result.tau for row in rows) - 0.5
    for axes in (above, below):
        plain_axes(axes)
        axes.axvspan(edge, len(rows) - 0.5, color=TAIL_SHADE, zorder=0)
        axes.set_xlim(-0.5, len(rows) - 0.5)
    below.annotate(
        f"shaded: the tail, which EXACT gives more weight (tau = {result.tau:,})",
        (1, 1),
        xycoords="axes fraction",
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=TAIL_LINE,
    )
    figure.savefig(path, dpi=130)


def draw_training(result: Comparison, path: str | os.PathLike[str]) -> None:
    """Draw the unweighted training loss of base and arms over tokens, and the arms' difference by step."""
    figure = new_figure(11.5, 4.8, "Training loss, unweighted: the loss by which the two arms can be compared")
    left, right = figure.subplots(1, 2)
    tokens, losses = {}, {}
    for run, lines in result.steps.items():
        tokens[run] = np.array([line["tokens"] for line in lines], np.float64)
        losses[run] = np.array([line["lm_loss"] for line in lines], np.float64)
    parting = tokens["base"][-1]
    unit, scale = ("million", 1e6) if parting + tokens["exact"][-1] >= 2e6 else ("thousand", 1e3)
    width = max(1, len(losses["exact"]) // 10)
    window = result.configs["base"]["model"]["data"]["seq_length"]
    for axes, x, y, color, thickness, label in (
        (left, tokens["base"], losses["base"], "#4a6fa5", 2, f"base, window {window:,}"),
        (left, parting + tokens["baseline"], losses["baseline"], COLORS["baseline"], 4.5, "baseline"),
        (left, parting + tokens["exact"], losses["exact"], COLORS["exact"], 1.6, "EXACT"),
        (right, tokens["exact"], losses["exact"] - losses["baseline"], "#4a6fa5", 2, None),
    ):
        axes.plot(x / scale, y, color=color, alpha=0.35, linewidth=1)
        smooth = _running_mean(x, width) / scale
        axes.plot(smooth, _running_mean(y, width), color=color, linewidth=thickness, label=label)
    left.axvline(parting / scale, color="black", linewidth=0.8, linestyle=":")
    left.set_title(f"Base, then both arms at a window of {result.window:,}", fontsize=12)
    left.set_ylabel("loss (nats per target)")
    left.set_xlabel(f"{unit} tokens")
    title = f"thick: mean of {width} steps"
    left.legend(title=title, loc="upper right", facecolor="white", edgecolor="none", framealpha=1)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_title("Difference at the same step, on the same text", fontsize=12)
    right.set_ylabel("EXACT − baseline (below 0: EXACT lower)")
    right.set_xlabel(f"{unit} tokens since the two arms parted")
    for axes in (left, right):
        plain_axes(axes)
    figure.savefig(path, dpi=130)


def _markdown(result: Comparison) -> str:
    base, exact = result.configs["base"], result.configs["exact"]
    model = exact["model"]
    settings = exact["model"]["exact"]
    total = result.total()
    parameters = result.facts.get("parameters")
    last_steps = max(1, len(result.steps["exact"]) // 10)
    end = {arm: float(np.mean([line["lm_loss"] for line in result.steps[arm][-last_steps:]])) for arm in ARMS}
    buckets = result.weights["buckets"]
    tail = [row for row in buckets if row["low"] >= result.tau]

    losses = [["effective context", "targets", *ARMS.values(), "difference", ""]]
    losses += [
        [f"{row['low']}-{row['high']}", f"{row['targets']:,}", *_losses(row), tail_mark(row, result.tau)]
        for row in result.losses()
    ]
    losses.append(["all", f"{total['targets']:,}", *_losses(total), ""])
    weights = [["effective context", "targets", "share", "weight", "weighted share", ""]]
    for row in buckets:
        shares = [percent(row["share"]), f"{row['weight']:.4f}", percent(row["weighted_share"])]
        weights.append([f"{row['low']}-{row['high']}", f"{row['targets']:,}", *shares, tail_mark(row, result.tau)])
    tokens_per_step = model["global_batch_size"] * result.window
    setup = [["", ""], *([name, str(value)] for name, value in result.facts.items() if name != "parameters")]
    setup += [
        ["ranks", str(exact["trainer"]["devices"] * exact["trainer"]["num_nodes"])],
        *([name.replace("_", " "), str(model[name])] for name in _LAYOUT),
        ["precision", str(exact["trainer"]["precision"])],
        ["steps of base", f"{base['trainer']['max_steps']:,} of {tokens_per_step:,} tokens"],
        ["steps of each arm", f"{exact['trainer']['max_steps']:,} of {tokens_per_step:,} tokens"],
        ["seed", str(model["seed"])],
    ]
    template = Path(__file__).with_name("comparison.md").read_text()
    return template.format(
        model=f"a model of {parameters:,} parameters" if parameters else "a model",
        base_tokens=result.steps["base"][-1]["tokens"],
        base_window=base["model"]["data"]["seq_length"],
        base_loss=_loss(result.held_out["base"]["validation_loss"]),
        arm_tokens=result.steps["exact"][-1]["tokens"],
        window=result.window,
        loss_table=markdown_table(losses, left=[5]),
        last_steps=last_steps,
        baseline_end=_loss(end["baseline"]),
        exact_end=_loss(end["exact"]),
        alpha=settings["alpha"],
        gamma=settings["gamma"],
        tau=result.tau,
        normalization=settings["normalization"],
        tail_share=percent(sum(row["share"] for row in tail)),
        weighted_tail_share=percent(sum(row["weighted_share"] for row in tail)),
        weight_table=markdown_table(weights, left=[5]),
        census=result.weights["census"],
        digest=result.weights["digest"],
        proof=", ".join(f"{name} {value}" for name, value in result.proof.items() if name != "weight table"),
        speed=result.speed(),
        held_out_targets=total["targets"],
        setup_table=markdown_table(setup, left=[0, 1]),
    )


_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "micro_batch_size",
)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def _losses(row: Row) -> list[str]:
    return [_loss(row["baseline"]), _loss(row["exact"]), _signed(row["difference"])]


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _count(number: int) -> str:
    for size, unit in ((1_000_000, "M"), (1000, "K")):
        if number >= 10 * size:
            return f"{number / size:,.0f}{unit}"
    return f"{number:,}"
