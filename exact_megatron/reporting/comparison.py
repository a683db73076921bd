"""What a paired comparison of baseline and EXACT measured, from the files of its runs: no torch, no megatron."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.files import changed_settings

ARMS = {"baseline": "baseline", "exact": "EXACT"}  # folder: name in tables and pictures
SKIPPED_STEPS = 5  # the first steps of an arm count for nothing in its speed: allocators and caches warm up


@dataclass(frozen=True)
class Comparison:
    """What a paired comparison left on disk; the keys are the runs "base", "baseline" and "exact".

    Attributes:
        configs: config.yaml of each run.
        steps: lines of metrics.jsonl of each run, in order.
        held_out: last line of validation.jsonl of each run.
        weights: exact/weights.json: census, digest, buckets.
        proof: arms.json, what benchmark/arms.py found on the arms' first batch before they were trained.
        facts: comparison.json: command, date, versions, hardware, number of parameters; empty without it.
    """

    configs: dict[str, dict[str, Any]]
    steps: dict[str, list[dict[str, Any]]]
    held_out: dict[str, dict[str, Any]]
    weights: dict[str, Any]
    proof: dict[str, Any]
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
        median = {}
        parts = []
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
        ValueError: a run has not reached its last step, the arms differ in more than model.exact.enabled or in the targets
            they were trained or measured on, or one of them was not trained with the weights that it should have.
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

    if not (folder / "arms.json").is_file():
        raise FileNotFoundError(f"{folder / 'arms.json'} does not exist: `exact-megatron compare` writes it")
    proof = json.loads((folder / "arms.json").read_text())
    for run in ARMS:
        check_trained(folder / run, proof if run == "exact" else None)
    weights = json.loads((folder / "exact" / "weights.json").read_text())
    facts = folder / "comparison.json"
    return Comparison(
        configs, lines["metrics"], held_out, weights, proof, json.loads(facts.read_text()) if facts.is_file() else {}
    )


def check_trained(run: str | os.PathLike[str], proof: Mapping[str, Any] | None) -> None:
    """Check by what a run of the native runner wrote that it was trained as the arm that it should be.

    Args:
        run: its folder, with metrics.jsonl.
        proof: what benchmark/arms.py found for a weighted arm; None for the baseline.

    Raises:
        ValueError: the weighted arm's loss was never weighted, or by another table than the proof's; the baseline's was.
    """
    steps = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    weighted = [line["step"] for line in steps if line["exact_loss"] != line["lm_loss"]]
    table = Path(run, "weights.json")
    digest = json.loads(table.read_text())["digest"] if table.is_file() else None
    if proof is None and (weighted or digest):
        first = f", and its loss is weighted from step {weighted[0]}" if weighted else ""
        raise ValueError(
            f"{run} should be the baseline, and has the weight table {digest}{first}: remove it and train it again"
        )
    if proof is not None and (not weighted or digest != proof["weight table"]):
        raise ValueError(
            f"{run} should be weighted by the table {proof['weight table']}; it has {digest}, and its loss is weighted in "
            f"{len(weighted)} of {len(steps)} steps: remove it and train it again"
        )
