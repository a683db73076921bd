"""`exact-megatron doctor`: what is installed, which hosts can be hooked, and what a run would do."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from .installed import hosts, versions
from .launched import megatron_lm_run
from .native import native_run

__all__ = ["add_arguments", "native_run", "run", "run_lines"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--config", metavar="FILE", action="append", help="YAML of the native runner; given again, later wins"
    )
    parser.add_argument(
        "line",
        nargs=argparse.REMAINDER,
        metavar="key=value ... | [settings] SCRIPT ARGUMENTS",
        help="overrides of --config, or a command line as given to `exact-megatron launch` or torchrun",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if the run would be refused."""
    rest = list(args.line)
    if "--json" in rest:  # REMAINDER takes what follows the first positional
        rest.remove("--json")
        args.json = True
    report: dict[str, Any] = {"versions": versions(), "hosts": {}}
    script = next((a for a in rest if a.endswith(".py")), None)
    report["hosts"] = hosts(Path(script) if script else _checkout())
    if script:
        report["run"] = megatron_lm_run(rest)
    elif args.config or rest:
        report["run"] = native_run(args.config, rest)
    print(json.dumps(report, indent=1) if args.json else "\n".join(lines(report)))
    return 1 if report.get("run", {}).get("refused") else 0


def _checkout() -> Path | None:
    where = os.environ.get("MEGATRON_LM")
    return Path(where) / "pretrain_gpt.py" if where else None


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    text = [f"{name:<20}{value}" for name, value in report["versions"].items()]
    text += ["", *(f"{name:<20}{value}" for name, value in report["hosts"].items())]
    run = report.get("run")
    return text if run is None else [*text, "", *run_lines(run)]


def run_lines(run: dict[str, Any]) -> list[str]:
    """What a run would do, and why it would not, as text."""
    text = [f"{name:<20}{value}" for name, value in run.get("plan", {}).items()]
    if "window" in run:
        text.append(
            f"{'EXACT':<20}{'enabled' if run['enabled'] else 'off: model.exact.enabled=false, nothing would be weighted'}"
        )
        text.append(f"{'documents':<20}{run['documents']}")
    if run.get("tau"):
        text.append(f"{'window, tau':<20}{run['window']}, {run['tau']} (alpha {run['alpha']}, gamma {run['gamma']})")
    if "tail_share" in run:
        share = f"{run['tail_share']:.1%} of the targets, {run['weighted_tail_share']:.1%} of the weight"
        stream = f"{run['data']} file pairs in stored order, once" if "data" in run else "the run's own stream"
        text.append(f"{'tail':<20}{share} ({stream})")
    reasons = [line for reason in run["refused"] for line in reason.splitlines()]
    if not reasons and run.get("enabled") is False:
        return [
            *text,
            f"{'refused':<20}nothing: the run would start without EXACT's weights (model.exact.enabled=true asks for them)",
        ]
    text += [f"{'refused':<20}{line}" for line in reasons] or [
        f"{'refused':<20}nothing: EXACT would start this run (layers of --spec and a checkpoint's weights are looked at when loaded)"
    ]
    return text
