"""A plan on standard output."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..reporting.style import Row, percent


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
    layout = stage["layout"]
    memory = stage["memory"]
    gib = 2**30

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

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
