"""`exact-megatron benchmark throughput --plan`: the cells, and how long they take by their FLOPs; nothing is measured."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ...planning.flops import causal_pairs
from ...planning.plan import GPU_MEMORY, PEAK_TFLOPS
from ...utils.files import write_text
from ..geometry import GEOMETRIES
from .bench import ARMS, WARMUP_BLOCKS
from .cells import Cell, blocks_of, fixed_layers, read_cells
from .jobs import TRIALS


def print_plan(args: argparse.Namespace) -> int:
    """Print the cells, and how long they take by benchmark/geometry.py's FLOPs at an assumed utilisation; whole windows count in every arm.

    Raises:
        ValueError: --assume-mfu is no share; see read_cells.
    """
    if not 0 < args.assume_mfu <= 1:
        raise ValueError(f"--assume-mfu {args.assume_mfu:g} must be above 0 and at most 1")
    cells = read_cells(args, True)
    peak = args.peak or PEAK_TFLOPS["bf16"]
    listed, others = _estimate(cells, args, args.assume_mfu * peak * 1e12)
    minutes = (sum(entry["s"] for entry in listed) + sum(others.values())) / 60
    said = (
        f"{len(cells)} cells, {minutes:.0f} minutes: computed from the geometries' FLOPs at an assumed {args.assume_mfu:g} of "
        f"{peak:g} TFLOP/s (--assume-mfu, --peak) and {args.assume_start:g} s to start a job (--assume-start); layers for "
        f"{args.gpu_memory or GPU_MEMORY:g} GiB (--gpu-memory)"
    )
    _print(listed, others, said)
    if args.json:
        listing = {"plan": said, "minutes": minutes, "cells": listed, "other jobs": others}
        write_text(args.json, json.dumps(listing, indent=1) + "\n")
    return 0


def _estimate(
    cells: list[Cell], args: argparse.Namespace, speed: float
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """An entry for each cell, and the seconds of the jobs that are no cell, at `speed` FLOP/s."""
    others = {"device": args.assume_start}
    listed: list[dict[str, Any]] = []
    layers_of: dict[tuple[str, int], int] = {}
    for cell in cells:
        if cell.model not in layers_of:
            same = [c for c in cells if c.model == cell.model]
            layers_of[cell.model] = fixed_layers(same, args, args.gpu_memory or GPU_MEMORY)
            for trial in TRIALS if args.trial_layers and not args.layers else ():
                seconds = len(ARMS) * args.block_steps * _step_flops(same[-1], args, trial) / speed
                others[f"{same[-1]}, trial of {trial} layers"] = args.assume_start + seconds
        layers = layers_of[cell.model]
        flops = _step_flops(cell, args, layers)
        step = flops / speed
        a_round = len(ARMS) * args.block_steps * step
        blocks = blocks_of(args, a_round)
        seconds = args.assume_start + (WARMUP_BLOCKS + blocks) * a_round
        listed.append(
            {"cell": str(cell), "layers": layers, "step FLOPs": flops, "step s": step, "blocks": blocks, "s": seconds}
        )
    return listed, others


def _step_flops(cell: Cell, args: argparse.Namespace, layers: int) -> float:
    run = cell.load(args, layers)
    pairs = run.model.global_batch_size * causal_pairs([run.model.data.seq_length])
    return GEOMETRIES[cell.geometry].step_flops(layers, run.tokens_per_step, pairs)


def _print(listed: list[dict[str, Any]], others: dict[str, float], said: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="benchmark throughput: plan, nothing is measured")
    for heading in ("cell", "layers", "PFLOP a step", "s a step", "blocks an arm", "s in all"):
        table.add_column(heading, justify="left" if heading == "cell" else "right")
    for entry in listed:
        numbers = f"{entry['step FLOPs'] / 1e15:.3f}", f"{entry['step s']:.2f}", str(entry["blocks"])
        table.add_row(entry["cell"], str(entry["layers"]), *numbers, f"{entry['s']:.0f}")
    for name, seconds in others.items():
        table.add_row(name, "", "", "", "", f"{seconds:.0f}")
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(table)
    console.print(said, soft_wrap=True)
