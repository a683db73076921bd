"""Tables and pictures: where supervision goes before and after EXACT, and what a paired comparison measured.

Reads censuses and the files of runs; no torch, no megatron. matplotlib, rich and omegaconf are imported where
they are used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .allocation import WeightTable
from .exposure import ExposureCensus

ARMS = {"baseline": "baseline", "exact": "EXACT"}  # folder: name in tables and pictures
COLORS = {"baseline": "#7d8793", "exact": "#d9541e"}
TAIL_SHADE, TAIL_LINE = "#fbeee6", "#6b4027"
SKIPPED_STEPS = 5  # the first steps of an arm count for nothing in its speed: allocators and caches warm up

Row = Mapping[str, Any]


def census_json(census: ExposureCensus, table: WeightTable) -> dict[str, Any]:
    """What `exact-megatron census --json` writes.

    Returns:
        seq_length and tau in tokens, samples, tokens, buckets: [{low, high (inclusive), targets, share,
        weight (as applied), weighted_share}], tail_share, weighted_tail_share, digest of the weight table,
        census_digest, and the settings alpha, gamma, eps, normalization, max_weight. Shares are fractions of
        all supervised targets, or of the sum of their weights.
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
    out = _table(
        f"Loss mass by effective context, window {census.seq_length:,} tokens",
        ["effective context", "targets", "share", "weight", "weighted share"],
    )
    for row in rows:
        _add_bucket(out, row, start, _percent(row["share"]), f"{row['weight']:.4f}", _percent(row["weighted_share"]))
    out.add_section()
    out.add_row("all", f"{census.targets:,}", _percent(1), f"{table.mean:.4f}", _percent(1), "")

    below = "tau" if start == config.tau else f"the first bucket from tau = {config.tau:,} on"
    counts = np.array([rows[b]["targets"] for b in tail])
    budget = float(counts @ (table.bucket_weights[tail] - 1) / counts.sum())
    alpha = f"alpha {config.alpha:g}"
    if budget < config.alpha - 1e-6:
        alpha += f", capped by max_weight {config.max_weight:g}"
    before, after = _percent(table.tail_share), _percent(table.weighted_tail_share)
    lines = [
        f"{_percent(census.share_below(start))} of the loss mass lies below l = {start:,} ({below}); "
        f"with the weights {_percent(1 - table.weighted_tail_share)}.",
        f"The tail has {before} of the targets, and {after} of the loss mass with the weights.",
        f"Budget: {_percent(budget)} more supervision for the tail's targets ({alpha}), shared out among its "
        f"buckets by inverse frequency (gamma {config.gamma:g}).",
        f"{census.samples:,} samples, {census.tokens:,} tokens. Census {census.digest}, weights {table.digest}.",
    ]
    if config.normalization == "corpus":
        mean = table.bucket_weights[0] / float(table.lookup[0])
        lines.insert(3, f"Weights are divided by their mean over the corpus, {mean:.6f}, so that the mean is 1.")
    _print(out, *lines)


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
    figure = _figure(11.5, 5.2, f"Which targets the loss is made of, in a window of {rows[-1]['high']:,} tokens")
    tail = [row for row in rows if row["low"] >= tau]
    weighted, numbers = list(rows), False
    if 0 < len(tail) < len(rows):
        widths = [max(len(rows), 4), min(max(len(tail) * 1.5, 3.5), len(rows))]
        left, axes = figure.subplots(1, 2, width_ratios=widths)
        weighted, numbers = tail, len(tail) <= 4
        before, after = (sum(row[key] for row in tail) for key in ("share", "weighted_share"))
        left.set_title(f"All targets: the tail's share goes from {_percent(before)} to {_percent(after)}", fontsize=12)
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
    _plain(axes)


def bucket_label(low: int, high: int) -> str:
    """Short name of a bucket for a picture: 512–1023, 1K–2K."""
    if low < 1024 or low % 1024:
        return f"{low}–{high}"
    return f"{low // 1024}K–{(high + 1) // 1024}K" if high % 1024 in (0, 1023) else f"{low // 1024}K–{high}"


@dataclass(frozen=True)
class Comparison:
    """What a paired comparison left on disk; the keys are the runs "base", "baseline" and "exact".

    Attributes:
        configs: config.yaml of each run.
        steps: lines of metrics.jsonl of each run, in order.
        held_out: last line of validation.jsonl of each run.
        weights: exact/weights.json: census, digest, buckets.
        facts: comparison.json: command, date, versions, hardware, number of parameters; empty without it.
    """

    configs: dict[str, dict[str, Any]]
    steps: dict[str, list[dict[str, Any]]]
    held_out: dict[str, dict[str, Any]]
    weights: dict[str, Any]
    facts: dict[str, Any]

    @property
    def window(self) -> int:
        """Window of the two arms in tokens."""
        return int(self.configs["exact"]["model"]["data"]["seq_length"])

    @property
    def tau(self) -> int:
        """Lower edge of the tail in tokens."""
        tau = self.configs["exact"]["model"]["exact"]["tau"]
        return self.window // 4 if tau is None else int(tau)

    def losses(self) -> list[dict[str, Any]]:
        """Held-out loss by effective context: [{low, high, targets, baseline, exact, difference}] in order of
        context; losses are unweighted, in nats per target, and None in a bucket without targets."""
        rows = []
        for name, bucket in self.held_out["baseline"]["buckets"].items():
            low, high = map(int, name.split("-"))
            loss = {arm: self.held_out[arm]["buckets"][name]["loss"] for arm in ARMS}
            difference = None if None in loss.values() else loss["exact"] - loss["baseline"]
            rows.append({"low": low, "high": high, "targets": bucket["targets"], **loss, "difference": difference})
        return sorted(rows, key=lambda row: row["low"])

    def total(self) -> dict[str, Any]:
        """The same over all buckets: {targets, baseline, exact, difference}."""
        loss = {arm: self.held_out[arm]["validation_loss"] for arm in ARMS}
        targets = sum(row["targets"] for row in self.losses())
        return {"targets": targets, **loss, "difference": loss["exact"] - loss["baseline"]}

    def speed(self) -> str:
        """A sentence with both arms' median speed, its spread over the steps, and the ratio."""
        median, parts = {}, []
        for arm, name in ARMS.items():
            values = np.array([line["tokens_per_s"] for line in self.steps[arm]])
            values = values[min(SKIPPED_STEPS, len(values) // 2) :]
            low, median[arm], high = np.percentile(values, [25, 50, 75])
            parts.append(
                f"{name} {median[arm]:,.0f} tokens/s (middle half of {len(values)} steps: {low:,.0f} to {high:,.0f})"
            )
        return f"Median speed: {', '.join(parts)}; EXACT / baseline {median['exact'] / median['baseline']:.3f}."


def read_comparison(comparison_dir: str | os.PathLike[str]) -> Comparison:
    """Read the runs base, baseline and exact in `comparison_dir`, and check that the two arms are a pair.

    Raises:
        FileNotFoundError: a run or one of its files is missing.
        ValueError: a run has not reached its last step, or the arms differ in more than model.exact.enabled
            or in the targets they were trained or measured on.
    """
    from omegaconf import OmegaConf

    folder = Path(comparison_dir)
    configs: dict[str, dict[str, Any]] = {}
    lines: dict[str, dict[str, list[dict[str, Any]]]] = {"metrics": {}, "validation": {}}
    for run in ("base", *ARMS):
        for name in ("config.yaml", "metrics.jsonl", "validation.jsonl"):
            if not (folder / run / name).is_file():
                raise FileNotFoundError(f"{folder / run / name} does not exist: `exact-megatron compare` writes it")
        configs[run] = OmegaConf.to_container(OmegaConf.load(folder / run / "config.yaml"))  # type: ignore[assignment]
        last = configs[run]["trainer"]["max_steps"]
        for name, runs in lines.items():
            text = (folder / run / f"{name}.jsonl").read_text()
            runs[run] = [json.loads(line) for line in text.splitlines()]
            if not runs[run] or runs[run][-1]["step"] != last:
                raise ValueError(f"{folder / run / name}.jsonl does not reach step {last}: run the comparison again")

    weighted = {run: configs[run]["model"]["exact"]["enabled"] for run in ARMS}
    differing = changed_settings(configs["baseline"], configs["exact"])
    others = [key for key in differing if not key.startswith(("model.exact.", "exp_manager.exp_dir"))]
    if others or weighted != {"baseline": False, "exact": True}:
        raise ValueError(
            f"{folder}: baseline and exact must differ in model.exact.enabled alone; it is "
            f"{weighted['baseline']} and {weighted['exact']}, and other differences are: "
            f"{', '.join(others) or 'none'}"
        )
    held_out = {run: lines["validation"][run][-1] for run in configs}
    trained = {run: [line["targets"] for line in lines["metrics"][run]] for run in configs}
    measured = {run: {k: b["targets"] for k, b in held_out[run]["buckets"].items()} for run in configs}
    for what, targets in (("trained", trained), ("measured", measured)):
        if targets["baseline"] != targets["exact"]:
            raise ValueError(f"{folder}: baseline and exact were {what} on different targets, so that they are no pair")

    weights = json.loads((folder / "exact" / "weights.json").read_text())
    facts = folder / "comparison.json"
    return Comparison(
        configs, lines["metrics"], held_out, weights, json.loads(facts.read_text()) if facts.is_file() else {}
    )


def changed_settings(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings in which two nested configurations differ: {"model.seed": (value in one, value in other)}."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in {**one, **other}:
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed.update(changed_settings(a, b, f"{prefix}{key}."))
        elif a != b:
            changed[f"{prefix}{key}"] = (a, b)
    return changed


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
    path.write_text(_markdown(result))
    if not quiet:
        print_comparison(result)
        _print(f"Report: {path}")
    return path


def print_comparison(result: Comparison) -> None:
    """Print held-out losses and speeds of both arms on standard output."""
    out = _table(
        f"Held-out loss by effective context, window {result.window:,} tokens",
        ["effective context", "targets", *ARMS.values(), "difference"],
    )
    for row in result.losses():
        _add_bucket(out, row, result.tau, *_losses(row))
    out.add_section()
    total = result.total()
    out.add_row("all", f"{total['targets']:,}", *_losses(total), "")
    _print(
        out,
        "Losses are unweighted, in nats per target, on the same samples in both arms.",
        result.speed(),
        "One seed of one run: it cannot tell whether a difference is more than chance (see the report).",
    )


def draw_held_out(result: Comparison, path: str | os.PathLike[str]) -> None:
    """Draw both arms' held-out loss by effective context, and the difference below."""
    rows = [row for row in result.losses() if row["difference"] is not None]
    figure = _figure(9.5, 6.6, f"Held-out loss by effective context, window {result.window:,} tokens")
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
    low, high = min(0.0, *differences), max(0.0, *differences)
    room = 0.2 * (high - low) or 1e-3
    below.set_ylim(low - room, high + room)
    below.set_ylabel("EXACT − baseline\n(below 0: EXACT lower)")
    below.set_xticks(x, [f"{bucket_label(row['low'], row['high'])}\n{_count(row['targets'])}" for row in rows])
    below.set_xlabel("effective context of a target in tokens, and the number of held-out targets that have it")
    edge = sum(row["low"] < result.tau for row in rows) - 0.5
    for axes in (above, below):
        _plain(axes)
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
    figure = _figure(11.5, 4.8, "Training loss, unweighted: the loss by which the two arms can be compared")
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
        _plain(axes)
    figure.savefig(path, dpi=130)


_REPORT = """\
# Baseline and EXACT from the same base

`base` is {model}, trained on {base_tokens:,} tokens at a window of {base_window:,}. `baseline` and
`exact` both go on from its weights, for {arm_tokens:,} tokens at a window of {window:,}: the same
samples in the same order, the same optimizer and schedule. They differ in one setting,
`model.exact.enabled`.

## Held-out loss by effective context

Unweighted, in nats per target, on the same held-out samples in both arms. The effective context of a
target is the number of tokens of its own document that it can see. The tail is what EXACT gives more
weight.

{loss_table}

The base's own held-out loss, at its window of {base_window:,} and so on other samples, was {base_loss}.

![Held-out loss by effective context](heldout.png)

## Training

Mean unweighted loss of the last {last_steps} steps: baseline {baseline_end}, EXACT {exact_end}.

![Training loss](training.png)

## Where supervision goes

alpha {alpha:g}, gamma {gamma:g}, tau {tau:,}, normalization {normalization}. The tail has {tail_share} of the
targets of the packed training data, and {weighted_tail_share} of its loss mass with the weights. All that
was packed is counted, also what the run did not reach.

{weight_table}

Digest of the census `{census}`, of the weight table `{digest}`.

![Share of the loss by effective context, before and after](census.png)

## Speed

{speed}

The arms ran one after another, each in processes of its own, and whatever else the machine did meanwhile
is in the ratio: a ratio within the spread of the steps says nothing. `exact-megatron benchmark` measures
the cost of the weighting.

## What this run can and cannot show

- It shows that the machinery works end to end: {model} was trained on {base_tokens:,} tokens, went on at
  another window for {arm_tokens:,} tokens in each arm, and was measured on {held_out_targets:,} held-out
  targets. It shows where supervision goes on this corpus.
- The differences in loss are no evidence for or against the method unless a run is far larger and
  repeated. This is one seed, so that nothing says how large a difference chance alone makes, and a small
  model that has seen little text makes little use of long context in either arm.
- The gains that the paper (arXiv 2605.10544) reports are for continued pretraining of models of 0.5B to
  3B parameters, on long-context tasks.

## Setup

{setup_table}

The full settings of each run are in its `config.yaml`.
"""


def _markdown(result: Comparison) -> str:
    base, exact = result.configs["base"], result.configs["exact"]
    model, settings, total = exact["model"], exact["model"]["exact"], result.total()
    parameters = result.facts.get("parameters")
    last_steps = max(1, len(result.steps["exact"]) // 10)
    end = {arm: float(np.mean([line["lm_loss"] for line in result.steps[arm][-last_steps:]])) for arm in ARMS}
    buckets = result.weights["buckets"]
    tail = [row for row in buckets if row["low"] >= result.tau]

    losses = [["effective context", "targets", *ARMS.values(), "difference", ""]]
    losses += [
        [f"{row['low']}-{row['high']}", f"{row['targets']:,}", *_losses(row), _mark(row, result.tau)]
        for row in result.losses()
    ]
    losses.append(["all", f"{total['targets']:,}", *_losses(total), ""])
    weights = [["effective context", "targets", "share", "weight", "weighted share", ""]]
    for row in buckets:
        shares = [_percent(row["share"]), f"{row['weight']:.4f}", _percent(row["weighted_share"])]
        weights.append([f"{row['low']}-{row['high']}", f"{row['targets']:,}", *shares, _mark(row, result.tau)])
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
    return _REPORT.format(
        model=f"a model of {parameters:,} parameters" if parameters else "a model",
        base_tokens=result.steps["base"][-1]["tokens"],
        base_window=base["model"]["data"]["seq_length"],
        base_loss=_loss(result.held_out["base"]["validation_loss"]),
        arm_tokens=result.steps["exact"][-1]["tokens"],
        window=result.window,
        loss_table=_markdown_table(losses),
        last_steps=last_steps,
        baseline_end=_loss(end["baseline"]),
        exact_end=_loss(end["exact"]),
        alpha=settings["alpha"],
        gamma=settings["gamma"],
        tau=result.tau,
        normalization=settings["normalization"],
        tail_share=_percent(sum(row["share"] for row in tail)),
        weighted_tail_share=_percent(sum(row["weighted_share"] for row in tail)),
        weight_table=_markdown_table(weights),
        census=result.weights["census"],
        digest=result.weights["digest"],
        speed=result.speed(),
        held_out_targets=total["targets"],
        setup_table=_markdown_table(setup, align="left"),
    )


_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "micro_batch_size",
)


def _markdown_table(rows: Sequence[Sequence[str]], align: str = "right") -> str:
    rule = ["---:" if align == "right" and name else "---" for name in rows[0]]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in (rows[0], rule, *rows[1:]))


def _table(title: str, columns: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("")
    return table


def _add_bucket(table: Any, row: Row, tau: int, *cells: str) -> None:
    mark = _mark(row, tau)
    table.add_row(
        f"{row['low']:,} - {row['high']:,}",
        f"{row['targets']:,}",
        *cells,
        mark,
        style="bold" if mark else None,
    )


def _print(*what: Any) -> None:
    """On standard output as it is now; not narrower than 100 columns where it is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 100))
    for part in what:
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))


def _mark(row: Row, tau: int) -> str:
    return "tail" if row["low"] >= tau else ""


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


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


def _figure(width: float, height: float, title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=14)
    return figure


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
