"""The page of a study: differences of each arm from the baseline over pairs of runs, by distance of the evidence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reporting.style import markdown_table, new_figure, plain_axes
from ..utils.environment import environment
from ..utils.files import read_json, write_text
from .plan import Study
from .statistics import Paired, holm, paired

SETS = {
    "documents": "Documents of the window's length",
    "fixed": "A question at the end of a document of the window's length",
    "beyond": "Documents of twice the window's length",
}
MEASURES = {"loss": "loss of the answer (nats)", "accuracy": "right answers (share)", "margin": "margin (nats)"}
PALETTE = ("#d9541e", "#8c2d04", "#7d8793", "#2c7fb8", "#41ab5d", "#6a51a3")


@dataclass(frozen=True)
class Result:
    """What study/evaluate.py measured of one run."""

    arm: str
    base: int
    seed: int
    measured: dict[str, Any]

    def mean(self, kind: str, measure: str, low: int, high: int) -> float | None:
        """Mean of a measure over the answers whose evidence is `low` to `high` tokens back; None without one."""
        rows = [row for row in self.measured[kind] if low <= row["low"] and row["high"] <= high]
        count = sum(row["answers"] for row in rows)
        return sum(row[measure] * row["answers"] for row in rows) / count if count else None


def read_results(study: Study) -> list[Result]:
    """Of all runs that are evaluated."""
    found = []
    for base in study.bases:
        for seed in study.seeds:
            for arm in study.arms:
                file = study.folder / f"runs/base_{base}/seed_{seed}/{arm.name}/study.json"
                if file.is_file():
                    found.append(Result(arm.name, base, seed, read_json(file)))
    return found


def differences(
    results: Sequence[Result], arm: str, baseline: str, value: Callable[[Result], float | None]
) -> dict[tuple[int, int], float]:
    """(base, seed) -> arm - baseline, of the pairs that have both."""
    found = {(r.base, r.seed): value(r) for r in results if r.arm == arm}
    before = {(r.base, r.seed): value(r) for r in results if r.arm == baseline}
    return {
        pair: here - there
        for pair, here in found.items()
        if here is not None and (there := before.get(pair)) is not None
    }


def over_bases(pairs: dict[tuple[int, int], float]) -> Paired:
    """The same over bases: a base's difference is the mean over its seeds."""
    bases = sorted({base for base, _ in pairs})
    return paired([sum(own) / len(own) for b in bases if (own := [d for (base, _), d in pairs.items() if base == b])])


def shown(found: Paired) -> str:
    """ "-.031 ± .012 (6 of 6)"; without an interval "-.031 (1 pair)"."""
    if found.half_width is None:
        return f"{found.mean:+.3f} (1 pair)"
    return f"{found.mean:+.3f} ± {found.half_width:.3f} ({found.same_sign} of {found.pairs})"


def write_report(study: Study) -> Path:
    """Write report.md, results.json and the pictures into the study's folder, about the runs that are there; returns report.md.

    Raises:
        ValueError: no arm has been trained and evaluated beside its baseline.
    """
    results = read_results(study)
    baseline, *arms = [arm.name for arm in study.arms]
    arms = [arm for arm in arms if any(r.arm == arm for r in results)]
    if not arms or not any(r.arm == baseline for r in results):
        raise ValueError(f"{study.folder} holds no arm beside its baseline yet: train the study first")
    lines = [
        "# Study: what the weights do",
        "",
        *_setting(study, results),
        "",
        f"Differences from {baseline} at the end of training: mean over pairs of runs that share base, data and order, ± half of a 95 % "
        "interval (Student's t over pairs), in brackets how many pairs have the sign of the mean. Losses in nats: negative is better.",
        "",
    ]
    for kind, title in SETS.items():
        for measure in ("loss", "accuracy"):
            lines += [f"## {title}: {MEASURES[measure]}", "", _table(study, results, arms, kind, measure), ""]
    lines += ["## Text, which needs no evidence: loss (nats)", "", _text_table(results, arms, baseline), ""]
    lines += ["![differences by distance](differences.png)", "", "![by distance](distance.png)", ""]
    path = study.folder / "report.md"
    raw = [{"arm": r.arm, "base": r.base, "seed": r.seed, **r.measured} for r in results]
    bases = {seed: read_json(study.folder / f"base_{seed}" / "study.json") for seed in study.bases}
    write_text(
        study.folder / "results.json",
        json.dumps({"machine": environment(), "bases": bases, "runs": raw}, indent=1) + "\n",
    )
    draw_differences(study, results, arms, study.folder / "differences.png")
    draw_distance(study, results, study.folder / "distance.png")
    write_text(path, "\n".join(lines))
    return path


def _setting(study: Study, results: Sequence[Result]) -> list[str]:
    gate = study.gate
    lines = [f"{len(study.arms)} arms, {len(study.bases)} bases, {len(study.seeds)} seeds of the data."]
    rows = [["base", "right answers below the gate's distance", "pairs"]]
    for seed in study.bases:
        file = study.folder / f"base_{seed}" / "study.json"
        near = Result("", seed, 0, read_json(file)).mean("documents", "accuracy", 0, (gate.below if gate else 128) - 1)
        pairs = len({(r.base, r.seed) for r in results if r.base == seed})
        verdict = f"{pairs}" if gate is None or (near or 0) >= gate.accuracy else "none: below the gate"
        rows.append([str(seed), "" if near is None else f"{near:.3f}", verdict])
    if gate:
        lines.append(
            f"The gate, set before: {gate.accuracy:g} right answers where the evidence is less than {gate.below} tokens back."
        )
    return [*lines, "", markdown_table(rows)]


def _table(study: Study, results: Sequence[Result], arms: Sequence[str], kind: str, measure: str) -> str:
    baseline = study.arms[0].name
    rows = [
        [
            "arm",
            *(f"{name}: {low}-{high} back" for name, (low, high) in study.ranges.items()),
            "p, last column",
            "over bases",
        ]
    ]
    last: list[Paired] = []
    for arm in arms:
        cells = []
        for low, high in study.ranges.values():
            pairs = differences(results, arm, baseline, lambda r: r.mean(kind, measure, low, high))  # noqa: B023
            found = paired(list(pairs.values())) if pairs else None
            cells.append("" if found is None else shown(found))
        last.append(found or paired([0.0]))
        rows.append([arm, *cells, "", shown(over_bases(pairs)) if pairs else ""])
    for row, p in zip(rows[1:], holm([found.p for found in last])):
        row[-2] = "" if p is None else f"{p:.1g}"
    return markdown_table(rows) + "\n\np: of no difference in the last range, corrected for the number of arms (Holm)."


def _text_table(results: Sequence[Result], arms: Sequence[str], baseline: str) -> str:
    rows = [["arm", "difference", "over bases"]]
    for arm in arms:
        pairs = differences(results, arm, baseline, lambda r: r.measured["text"])
        rows.append([arm, shown(paired(list(pairs.values()))), shown(over_bases(pairs))])
    return markdown_table(rows)


def bins(results: Iterable[Result], kind: str) -> list[tuple[int, int]]:
    return sorted({(row["low"], row["high"]) for r in results for row in r.measured[kind]})


def draw_differences(study: Study, results: Sequence[Result], arms: Sequence[str], path: Path) -> None:
    """Loss minus the baseline's by distance, an arm a line with its intervals, one panel a set of documents."""
    figure = new_figure(13, 4.6, f"Loss of the answer, difference from {study.arms[0].name}")
    panels = figure.subplots(1, len(SETS), sharey=True)
    for axes, (kind, title) in zip(panels, SETS.items()):
        edges = bins(results, kind)
        for number, arm in enumerate(arms):
            found = []
            for low, high in edges:
                pairs = differences(results, arm, study.arms[0].name, lambda r: r.mean(kind, "loss", low, high))  # noqa: B023
                found.append(paired(list(pairs.values())) if pairs else paired([0.0]))
            x = [low * 2**0.5 * 1.03**number for low, _ in edges]  # apart, so that intervals do not hide each other
            color = PALETTE[number % len(PALETTE)]
            error = [f.half_width or 0 for f in found]
            axes.errorbar(
                x, [f.mean for f in found], error, color=color, marker="o", markersize=4, capsize=2, label=arm
            )
        _distance_axis(axes, title, edges)
    panels[0].set_ylabel("nats; below 0 is better")
    panels[0].legend(fontsize=9)
    figure.savefig(path, dpi=130)


def draw_distance(study: Study, results: Sequence[Result], path: Path) -> None:
    """Right answers by distance, a line an arm: mean over all its runs."""
    figure = new_figure(13, 4.6, "Right answers by distance of the evidence")
    panels = figure.subplots(1, len(SETS), sharey=True)
    for axes, (kind, title) in zip(panels, SETS.items()):
        edges = bins(results, kind)
        for number, arm in enumerate(a.name for a in study.arms):
            own = [r for r in results if r.arm == arm]
            if not own:
                continue
            means = []
            for low, high in edges:
                values = [value for r in own if (value := r.mean(kind, "accuracy", low, high)) is not None]
                means.append(sum(values) / len(values) if values else float("nan"))
            color = "#222222" if number == 0 else PALETTE[(number - 1) % len(PALETTE)]
            axes.plot([low * 2**0.5 for low, _ in edges], means, color=color, marker="o", markersize=4, label=arm)
        _distance_axis(axes, title, edges)
    panels[0].set_ylabel("share")
    panels[0].legend(fontsize=9)
    figure.savefig(path, dpi=130)


def _distance_axis(axes: Any, title: str, edges: Sequence[tuple[int, int]]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([low for low, _ in edges], [str(low) for low, _ in edges])
    axes.minorticks_off()
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("tokens back to the evidence")
    plain_axes(axes)
