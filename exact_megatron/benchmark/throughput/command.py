"""The options of `exact-megatron benchmark throughput`, and its loop over the cells."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...config import ExactError
from ...planning.plan import GPU_MEMORY, PEAK_TFLOPS
from .. import harness
from ..geometry import GEOMETRIES
from ..harness import Measured
from . import jobs
from .cells import DRY, OPTIONS, PAIRS, PRECISIONS, Cell, Result, asked_of, fixed_layers, measured_cells, read_cells
from .plan import print_plan
from .results import rows_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--geometry", default="tiny", help=f"comma-separated: {', '.join(GEOMETRIES)}")
    add("--windows", default="4096,8192,16384,32768", help="comma-separated, in tokens")
    add(
        "--precisions",
        help=f"comma-separated: {', '.join(PRECISIONS)} (the last three are FP8); default: bf16, fp32 on a CPU",
    )
    add(
        "--layers",
        type=int,
        help="default: the geometry's, or as many as fit into the GPU's memory by planning/memory.py",
    )
    add("--trial-layers", action="store_true", help="measure one and two layers of a window to find how many fit")
    add("--gpu-memory", type=float, metavar="GIB", help=f"default: this GPU's; with --plan {GPU_MEMORY:g}, an H100's")
    add("--prefix", help="take the documents' lengths from PREFIX.idx; default: log-normal ones")
    add("--step-tokens", type=int, default=32768, help="of an optimizer step, at least a window")
    add("--micro-tokens", type=int, default=8192, help="of a micro-batch, at least a window")
    add("--blocks", type=int, default=24, help=f"counted blocks of each arm, at most; from {PAIRS} on, but with {DRY}")
    add("--block-steps", type=int, default=1, help="optimizer steps of a block")
    add("--cell-seconds", type=int, default=40, help=f"fewer blocks ({PAIRS} at least) where they would take longer")
    add(
        "--peak",
        type=float,
        help="TFLOP/s that MFU is a share of; default: a bf16 product measured before the first cell; with --plan "
        f"{PEAK_TFLOPS['bf16']:g}, an H100's by its data sheet",
    )
    add(
        "--cells",
        metavar="FILE",
        help="append a JSON line a cell; cells that are in it, from the same options, documents, GPU and versions, are not "
        "measured again",
    )
    add("--until", type=int, metavar="SECONDS", help="start no cell after so many seconds from the start")
    add("--profile", action="store_true", help="also a table of the kernels of a step, and the loss end alone")
    add("--plan", action="store_true", help="measure nothing: list the cells, and how long they take by their FLOPs")
    add("--assume-mfu", type=float, default=0.35, help="share of --peak that --plan assumes, for FP8 too (%(default)s)")
    add(
        "--assume-start",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="to start a job and build its model (%(default)s)",
    )
    add("overrides", nargs="*", metavar="key=value", help="for example model.apply_rope_fusion=true")


def run(args: argparse.Namespace) -> int:
    """Measure, or with --plan say how long that would take."""
    return print_plan(args) if args.plan else harness.run(args)


@dataclass
class Session:
    """What one command measures, and what there is so far.

    Attributes:
        device: {"GPU", "peak": TFLOP/s of a bf16 product, "memory": GiB}; without a GPU "none", what was given, None.
        asked: see asked_of.
        left: cells for which --until left no time.
    """

    args: argparse.Namespace
    cells: Sequence[Cell]
    device: dict[str, Any]
    asked: dict[str, Any]
    found: dict[Cell, Result] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def take_measured(self) -> None:
        """Take the cells of --cells that come from the same options, documents, GPU and versions; say why others do not count."""
        differ: dict[Cell, str] = {}
        for known in measured_cells(self.args.cells):
            cell, theirs = Cell.of(known), known["asked"]
            other = [name for name in self.asked if theirs.get(name) != self.asked[name]]
            if not other:
                self.found[cell] = known
            else:
                differ[cell] = ", ".join(f"{name} {theirs.get(name)}, not {self.asked[name]}" for name in other)
        for cell, values in differ.items():
            if cell not in self.found and cell in self.cells:
                print(f"throughput: {cell} of {self.args.cells} does not count here: {values}", file=sys.stderr)

    def layers(self, cell: Cell, options: dict[str, Any]) -> int:
        """Layers of a cell's model, alike in all precisions of its geometry and window.

        Raises:
            OutOfMemory: not even one layer fits.
        """
        measured = [result["layers"] for other, result in self.found.items() if other.model == cell.model]
        if measured and not self.args.layers:  # also after a resume
            return int(min(measured))
        same = [other for other in self.cells if other.model == cell.model]
        gpu_memory = self.args.gpu_memory or self.device["memory"]
        if self.args.trial_layers and self.device["GPU"] != "none" and not self.args.layers:
            return jobs.trial_layers(same[-1], options, gpu_memory)
        return fixed_layers(same, self.args, gpu_memory)

    def measure(self, cell: Cell) -> None:
        """Measure a cell and append it to --cells; a failure is noted, and ends no other cell.

        Raises:
            KeyboardInterrupt: SIGINT came; the cell is kept where its blocks were timed.
        """
        print(f"throughput: {cell}", file=sys.stderr, flush=True)
        options = {name: getattr(self.args, name) for name in OPTIONS}
        try:
            result = jobs.cell_that_fits(cell, options, self.layers(cell, options), self.device["peak"])
        except (jobs.OutOfMemory, ExactError) as error:
            lack = "not even one layer fits, lower --micro-tokens: " if isinstance(error, jobs.OutOfMemory) else ""
            self.failed.append(f"{cell}: {lack}{error}")
            print(f"throughput: {self.failed[-1]}", file=sys.stderr, flush=True)
            return
        code = result.pop("exit code", 0)
        if code:
            result["no profile"] = f"the process ended with exit code {code} while it was profiled"
        result["asked"] = self.asked
        self.found[cell] = result
        if self.args.cells:
            with open(self.args.cells, "a") as file:
                file.write(json.dumps(result) + "\n")
        if code == jobs.INTERRUPTED:
            raise KeyboardInterrupt

    def facts(self) -> dict[str, Any]:
        """What the table's numbers are, what the arms were proved to be, and what is missing."""
        args, results = self.args, self.found.items()
        failed = [
            *self.failed,
            *(f"{cell}: {result['no profile']}" for cell, result in results if "no profile" in result),
        ]
        facts: dict[str, Any] = {
            "setup": (
                f"one rank on {'cpu' if self.device['GPU'] == 'none' else 'cuda'}, each cell in a process of its own, "
                f"{args.block_steps} steps a block, arms in turn on the same samples; ratio: median over pairs of blocks, 95 % "
                "interval by bootstrap; FP8 against bf16: the cells one after the other"
            ),
            "arms": {
                str(cell): ", ".join(f"{name} {value}" for name, value in result["proof"].items())
                for cell, result in results
            },
        }
        if repeated := [words for _, result in results for words in result["repeated"]]:
            facts["out of memory, repeated with a layer fewer"] = "; ".join(repeated)
        if self.left:
            facts["left for another call"] = (
                f"{len(self.left)} of {len(self.cells)} cells (--until {args.until}): {', '.join(self.left)}"
            )
        if failed:
            facts[harness.FAILED] = "; ".join(failed)
        return facts


def measure(args: argparse.Namespace) -> Measured:
    """Every cell that is not in --cells yet, then the table of all."""
    from ...utils.ranks import is_rank

    if is_rank():
        raise ValueError("`exact-megatron benchmark throughput` is one rank: start it without torchrun or srun")
    import torch

    started = time.monotonic()
    on_gpu = torch.cuda.is_available()
    cells = read_cells(args, on_gpu)
    device: dict[str, Any] = {"GPU": "none", "peak": args.peak, "memory": None}
    if on_gpu:
        device = jobs.start_job({"job": "device", "options": {"peak": args.peak}})
    session = Session(args, cells, device, asked_of(args, device["GPU"]))
    session.take_measured()
    ended: dict[str, Any] = {}
    with harness.written_at_interrupt(ended):
        for cell in cells:
            if cell in session.found:
                continue
            if args.until and time.monotonic() - started > args.until:
                session.left.append(str(cell))
                continue
            session.measure(cell)
    if not session.found and session.left:
        raise ValueError(f"--until {args.until} left no time for a single cell")
    return session.facts() | ended, rows_of(list(session.found.values()))
