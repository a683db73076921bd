"""The results of a GPU session as one page: python benchmarks/gpu/report.py RESULTS [--output docs/results] [--note TEXT]

RESULTS is a folder with what the scripts here left in $OUT, of one or several calls: te.json, pytest.xml, gpu_tests.jsonl,
cells.jsonl, ceiling.json, profile.jsonl, profile_fused.jsonl, cpt.json, machine.txt, commands.txt; what is missing is said to be
missing. Written: OUTPUT/<date>-<gpu>.md and OUTPUT/<date>-<gpu>.png. Every number is read from these files.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SPEED_BAR, MEMORY_BAR = 0.995, 1.01  # of exact_megatron/throughput_benchmark.py
Json = dict[str, Any]


def lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in text)


def name_of(cell: Json) -> str:
    return f"{cell['geometry']}, {cell['layers']} layers, {cell['window']:,}, {cell['precision']}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def throughput(cells: list[Json]) -> str:
    rows = []
    for cell in cells:
        arms = cell["arms"]
        own, base, causal = (arms[name] for name in ("exact", "baseline", "causal"))
        compared, masked = cell["EXACT against baseline"], cell["masked against causal"]
        low, high = compared["interval"]
        memory = own["peak GiB"] / base["peak GiB"] if base["peak GiB"] else None
        verdict = compared["ratio"] >= SPEED_BAR and (memory is None or memory <= MEMORY_BAR)
        rows.append([
            name_of(cell), f"{own['tokens/s']:,.0f}", f"{base['tokens/s']:,.0f}", f"{compared['ratio']:.4f} ({low:.4f} to {high:.4f})",
            "" if memory is None else f"{own['peak GiB']:.2f} / {base['peak GiB']:.2f}", f"{own['step s']:.3f}",
            f"{own['TFLOP/s']:.1f}", percent(own["MFU"]), f"{causal['TFLOP/s']:.1f}", f"{masked['ratio']:.3f}",
            "passed" if verdict else "**missed**",
        ])  # fmt: skip
    head = ["geometry, layers, window, precision", "EXACT tokens/s/GPU", "baseline", "ratio (95 %)", "peak GiB", "step s",
            "TFLOP/s", "MFU", "causal TFLOP/s", "masked / causal", "bar"]  # fmt: skip
    missed = sum(row[-1] != "passed" for row in rows)
    pieces = {cell["window"]: cell["pieces"] for cell in cells}
    lengths = "; ".join(f"{w:,}: median {p['median']:,.0f}, mean {p['mean']:,.0f}" for w, p in sorted(pieces.items()))
    peaks = sorted({round(cell["peak TFLOP/s"]) for cell in cells if cell["peak TFLOP/s"]})
    return (
        f"Bar: at least {SPEED_BAR} of the baseline's tokens/s and at most {MEMORY_BAR} of its peak memory; {len(rows) - missed} of "
        f"{len(rows)} cells keep it. `TFLOP/s` counts attention by the pieces of the documents; `causal` is the same model with every "
        f"sample as one document, attention counted over the whole window, the way published numbers are. MFU: share of {peaks} "
        f"TFLOP/s (a bf16 product of 8192, measured in the same call), for FP8 too. Documents: {cells[0]['documents']}; tokens of a "
        f"piece by window: {lengths}.\n\n" + table(head, rows) + "\n\n" + fp8_against_bf16(cells)
    )


def fp8_against_bf16(cells: list[Json]) -> str:
    key = lambda cell: (cell["geometry"], cell["window"], cell["layers"])
    plain = {key(cell): cell for cell in cells if cell["precision"] == "bf16"}
    rows = [
        [name_of(cell), f"{cell['arms']['exact']['tokens/s'] / plain[key(cell)]['arms']['exact']['tokens/s']:.3f}"]
        for cell in cells
        if cell["precision"] != "bf16" and key(cell) in plain
    ]
    return (
        "FP8 against bf16, cells one after the other:\n\n" + table(["cell", "ratio of tokens/s"], rows) if rows else ""
    )


def ceiling(found: Json) -> str:
    rows = [[row["name"], f"{row['own']:,.1f} {row['unit']}", f"{row['ratio']:.3f}"] for row in found["rows"]]
    return found["setup"] + ".\n\n" + table(["product", "measured", "of the reference"], rows)


def profiles(cells: list[Json], title: str) -> str:
    parts = []
    for cell in cells:
        if "profile" not in cell:
            continue
        profile, end = cell["profile"], cell["loss end"]
        groups = table(
            ["part of the step", "share of the busy time"], [[n, percent(s)] for n, s in profile["groups"].items()]
        )
        shown = profile["kernels"][:12]
        kernels = table(
            ["kernel", "share", "calls a step", "ms a step"],
            [
                [f"`{k['name'][:80].replace('|', ' ')}`", percent(k["share"]), f"{k['calls']:g}", f"{k['ms']:.2f}"]
                for k in shown
            ],
        )
        busy = profile["device s"] / profile["wall s"]
        speed = cell["arms"]["exact"]
        parts.append(
            f"### {name_of(cell)}{title}\n\n{speed['tokens/s']:,.0f} tokens/s, {speed['TFLOP/s']:.1f} TFLOP/s. Busy {percent(busy)} of "
            f"the wall clock under the profiler. The loss end alone (logits, cross entropy, both ways, of a micro-batch): "
            f"{end['s'] * 1e3:.2f} ms, {percent(end['share of the step'])} of the step, {end['GiB']:.2f} GiB above the rest.\n\n"
            f"{groups}\n\n{kernels}"
        )
    return "\n\n".join(parts)


def checks(folder: Path) -> str:
    text = []
    if (folder / "te.json").exists():
        found = json.loads((folder / "te.json").read_text())
        cases = {name: value for name, value in found.items() if isinstance(value, dict) and "ok" in value}
        rows = []
        for name, case in cases.items():
            numbers = ", ".join(f"{key} {value}" for key, value in case.items() if key not in ("ok", "s"))
            rows.append([name, "passed" if case["ok"] else "**failed**", case.get("error") or numbers])
        facts = ", ".join(f"{key} {found[key]}" for key in ("gpu", "torch", "cudnn", "nccl") if key in found)
        text.append(f"check_te_gpu.py ({facts}):\n\n" + table(["case", "", "relative errors, numbers"], rows))
    if (folder / "pytest.xml").exists():
        cases = list(ElementTree.parse(folder / "pytest.xml").iter("testcase"))
        outcome = lambda case: next(
            (tag for tag in ("failure", "error", "skipped") if case.find(tag) is not None), "passed"
        )
        counted = [outcome(case) for case in cases]
        summary = ", ".join(f"{counted.count(kind)} {kind}" for kind in ("passed", "failure", "error", "skipped"))
        failed = [f"* {c.get('name')}: {outcome(c)}: {next(iter(c)).get('message', '')[:200]}" for c, kind in zip(cases, counted)
                  if kind in ("failure", "error")]  # fmt: skip
        text.append(f"pytest -m gpu: {summary}.\n" + "\n".join(failed))
    return "\n\n".join(text)


def cpt(found: Json) -> str:
    rows, buckets = [], []
    for run in found["runs"]:
        validation = run["validation"]
        label = f"{run['arm']}, seed {run['seed']}, {run['window']:,}"
        held = "" if validation is None else f"{validation['validation_loss']:.4f}"
        rows.append([label, run["steps"], f"{run['tokens']:,}", f"{run['last losses']:.4f}", held, f"{run['tokens/s']:,.0f}",
                     "yes" if run["finished"] else "no"])  # fmt: skip
        for name, bucket in (validation or {}).get("buckets", {}).items():
            if bucket["targets"]:
                buckets.append([label, name, f"{bucket['loss']:.4f}", f"{bucket['targets']:,}"])
    head = ["run", "steps", "tokens", "last losses", "held-out loss", "tokens/s", "finished"]
    return (
        f"{found['finished']} of {found['tasks']} tasks done; learning rate {found['lr']} (ours). Unweighted losses; by effective context "
        "below. Intervals are in the evaluation's own reports.\n\n" + table(head, rows) + "\n\n"
        + table(["run", "effective context", "held-out loss", "targets"], buckets)
    )  # fmt: skip


def picture(cells: list[Json], path: Path) -> None:
    """Left: tokens/s of EXACT over the baseline with intervals and the bar. Right: TFLOP/s, masked and causal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 1.5 + 0.32 * len(cells)), sharey=True)
    for y, cell in enumerate(cells):
        ratio, (low, high) = cell["EXACT against baseline"]["ratio"], cell["EXACT against baseline"]["interval"]
        left.errorbar(
            ratio, y, xerr=[[max(0.0, ratio - low)], [max(0.0, high - ratio)]], fmt="o", color="tab:blue", capsize=3
        )
        right.barh(
            y - 0.2, cell["arms"]["causal"]["TFLOP/s"], 0.35, color="tab:gray", label="causal" if not y else None
        )
        right.barh(
            y + 0.2, cell["arms"]["exact"]["TFLOP/s"], 0.35, color="tab:blue", label="EXACT, masked" if not y else None
        )
    left.axvline(SPEED_BAR, color="tab:red", linestyle="--", label=f"bar {SPEED_BAR}")
    left.axvline(1.0, color="black", linewidth=0.8)
    left.set_yticks(range(len(cells)), [name_of(cell) for cell in cells], fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("tokens/s of EXACT / baseline, 95 % interval")
    right.set_xlabel("model TFLOP/s a GPU")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(folder: Path, output: Path, note: str = "") -> Path:
    """Write the page and its picture; returns the page.

    Raises:
        ValueError: the folder has no results.
    """
    cells, profiled, fused = (lines(folder / f"{name}.jsonl") for name in ("cells", "profile", "profile_fused"))
    paths = {name: folder / f"{name}.json" for name in ("ceiling", "cpt", "te")}
    single = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    measured = [*cells, *profiled, *([single["ceiling"]] if "ceiling" in single else [])]
    if not measured and not single:
        raise ValueError(f"{folder} has no results of benchmarks/gpu")
    gpus = {found["GPU"] for found in measured} or {single.get("te", {}).get("gpu", "unknown GPU")}
    if len(gpus) > 1:
        raise ValueError(f"{folder} mixes results of {', '.join(sorted(gpus))}: one page is about one kind of GPU")
    (gpu,) = gpus
    date = max((found["date"] for found in measured), default="undated")
    stem = f"{date[:10]}-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}"
    output.mkdir(parents=True, exist_ok=True)
    text = [f"# {gpu}, {date[:10]}", *([note] if note else [])]
    if measured:
        versions = ", ".join(f"{name} {version}" for name, version in measured[-1]["versions"].items())
        text.append(f"{measured[-1]['CPU']}. {versions}. One GPU.")
    if (folder / "machine.txt").exists():
        seen = dict.fromkeys((folder / "machine.txt").read_text().splitlines())  # the same lines of every call once
        text.append("\n".join(f"    {line}" for line in seen))
    text.append("Written by `benchmarks/gpu/report.py` from what the scripts there measured.")

    def section(title: str, body: str) -> None:
        text.append(f"## {title}\n\n{body or 'Not measured.'}")

    section("Does it work", checks(folder))
    if cells:
        picture(cells, output / f"{stem}.png")
    shown = f"\n\n![EXACT against the baseline, and TFLOP/s]({stem}.png)" if cells else ""
    section("EXACT against the baseline", throughput(cells) + shown if cells else "")
    section("What the card manages", ceiling(single["ceiling"]) if "ceiling" in single else "")
    where = [part for part in (profiles(profiled, ""), profiles(fused, ", fused RoPE and cross entropy")) if part]
    section("Where the time goes", "\n\n".join(where))
    section("Paired continued pretraining", cpt(single["cpt"]) if "cpt" in single else "")
    commands = folder / "commands.txt"
    section(
        "Commands", "".join(f"    {line}\n" for line in commands.read_text().splitlines()) if commands.exists() else ""
    )
    page = output / f"{stem}.md"
    page.write_text("\n\n".join(text).rstrip() + "\n")
    return page


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--note", default="", help="a sentence under the title")
    args = parser.parse_args(argv)
    try:
        print(write(args.results, args.output, args.note))
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
