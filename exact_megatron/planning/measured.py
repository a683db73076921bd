"""What a finished run measured, beside the estimates."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .data import read_data
from .flops import flops_per_token
from .memory import memory

if TYPE_CHECKING:
    from ..training.schema import RunConfig


UNCOUNTED_STEPS = 3  # of a measured run, at its start


def vocabulary_size(run: RunConfig) -> int:
    if run.model.override_vocab_size is not None:
        return run.model.override_vocab_size
    from ..training.data_files import read_vocabulary

    return read_vocabulary(run, scan=False).vocab_size


def read_measured(path: str) -> dict[str, Any]:
    """Speed, and the memory beside its estimate, from a run's folder.

    Raises:
        FileNotFoundError, ValueError: there is nothing measured at `path`.
    """
    from ..training.config import load_config

    if not os.path.isdir(path):
        raise ValueError(
            f"--measured {path}: give the folder of a run (exp_manager.exp_dir), which says what was trained"
        )
    folder = Path(path)
    run = load_config(folder / "config.yaml")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if len(lines) <= UNCOUNTED_STEPS:
        raise ValueError(f"{path} has {len(lines)} steps; {UNCOUNTED_STEPS} are not counted: measure a longer run")
    record = folder / "memory.json"
    facts = json.loads(record.read_text()) if record.is_file() else None
    vocab_size = facts["vocab_size"] if facts else vocabulary_size(run)
    m = run.model
    layout = f"TP {m.tensor_model_parallel_size}, PP {m.pipeline_model_parallel_size}, CP {m.context_parallel_size}"
    return {
        "source": f"{path}: median of {len(lines) - UNCOUNTED_STEPS} steps, {run.world_size} ranks ({layout}), window "
        f"{m.data.seq_length:,}",
        "tokens_per_second_per_gpu": median(line["tokens_per_s"] for line in lines[UNCOUNTED_STEPS:]) / run.world_size,
        "flops_per_token": flops_per_token(run, vocab_size, read_data(run)[0])["total"],
        "memory": compare_memory(run, facts) if facts else None,
    }


def compare_memory(run: RunConfig, record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a pipeline stage: estimated and measured bytes, the largest of the stage's ranks."""
    rows = []
    for part in memory(run, record["vocab_size"]):
        ranks = [rank for rank in record["ranks"] if rank["stage"] == part.stage]
        row: dict[str, Any] = {"stage": part.stage}
        for name in ("weights", "gradients", "optimizer"):
            row[name] = (getattr(part, name), max(rank[name] for rank in ranks))
        if ranks[0]["peak_allocated"] is not None:
            row["allocated"] = (part.total - part.overhead, max(rank["peak_allocated"] for rank in ranks))
            row["device"] = (part.total, max(rank["device_used"] for rank in ranks))
        rows.append(row)
    return rows
