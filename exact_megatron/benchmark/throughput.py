"""`exact-megatron benchmark throughput`: EXACT against the same run without it, at the sizes people train.

One rank. A cell is a geometry, a window and a precision. In it one model takes blocks of whole training steps (loader, forward,
backward, optimizer) in turn for three arms, on the same samples: exact; baseline, the same document masks without weights;
and causal, without weights and with every sample as one document. Documents are random tokens with log-normal or given lengths.

Each model lives in a process of its own (`python -m exact_megatron.benchmark.throughput`, one job each), which gives all of its
memory back: megatron.core's DDP hooks, schedule functions and FP8 state hold a model in cycles that no `del` opens.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import ExactError
from ..packing import read_index
from ..planning.flops import causal_pairs
from ..planning.memory import memory
from ..planning.plan import GPU_MEMORY, PEAK_TFLOPS
from ..utils import bootstrap
from ..utils.environment import GIB, machine
from ..utils.files import write_text
from . import harness
from .arms import Arm, Step, digest, prove_arms, prove_steps, watch_step
from .geometry import GEOMETRIES
from .harness import RESAMPLES, SEED, Measured, Row, interleaved, interval
from .one_rank import STEP_FORCED, twin
from .synthetic import write_corpus

if TYPE_CHECKING:
    from ..training.schema import RunConfig

ARMS = ("exact", "baseline", "causal")
PRECISIONS = ("fp32", "bf16", "delayed", "tensorwise", "blockwise")
SPEED_BAR, MEMORY_BAR = 0.998, 1.01
COMPARED = {  # own arm, reference arm
    "EXACT against baseline": ("exact", "baseline"),
    "masked against causal": ("baseline", "causal"),
}
INTERRUPTED = 130  # exit code after SIGINT
WARMUP_BLOCKS = 2  # uncounted, of each arm
PAIRS = 8  # counted blocks of each arm, at least
DRY = "tiny"  # the geometry of dry runs on a CPU, of as few blocks as are asked for
TRIALS = (1, 2)  # layers, with --trial-layers
SPARE = 0.85  # of the device's memory may be filled by the estimate of planning/memory.py, which knows no workspaces and no fragments
# Of the options, what a job needs, and what else decides how many layers or which peak it gets.
OPTIONS = "prefix step_tokens micro_tokens blocks block_steps cell_seconds profile overrides".split()
ASKED = [*OPTIONS, *"layers trial_layers gpu_memory peak".split()]


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


@dataclass(frozen=True)
class Cell:
    """What one model is built for."""

    geometry: str
    window: int
    precision: str

    def __str__(self) -> str:
        return (
            f"{self.geometry} {self.window // 1024}K {self.precision}"
            if self.window >= 1024
            else (f"{self.geometry} {self.window} {self.precision}")
        )

    @property
    def fp8(self) -> bool:
        return self.precision in ("delayed", "tensorwise", "blockwise")

    def settings(self, args: argparse.Namespace, layers: int, folder: str, steps: int) -> list[str]:
        """Overrides for the native runner."""
        micro = max(1, args.micro_tokens // self.window)
        batch = max(1, args.step_tokens // (micro * self.window)) * micro
        made = [
            *GEOMETRIES[self.geometry].overrides(layers),
            f"model.data.seq_length={self.window}",
            f"model.micro_batch_size={micro}",
            f"model.global_batch_size={batch}",
            f"trainer.precision={'32' if self.precision == 'fp32' else 'bf16'}",
            f"model.fp8={str(self.fp8).lower()}",
            "model.optim.lr=1e-5",
            "model.data.splits_string=1",
            f"model.data.data_prefix=[{folder}/corpus]",
            "exp_manager.create_tensorboard_logger=false",
        ]
        if self.fp8:  # blockwise is E4M3 both ways in Transformer Engine's own default
            made += [
                f"model.fp8_recipe={self.precision}",
                f"model.fp8_hybrid={str(self.precision != 'blockwise').lower()}",
            ]
        forced = [f"model.data.index_mapping_dir={folder}/cache", f"exp_manager.exp_dir={folder}/run"]
        forced += ["model.exact.enabled=true", f"trainer.max_steps={steps}"]
        return [*made, *args.overrides, *STEP_FORCED, *forced]

    def load(self, args: argparse.Namespace, layers: int) -> RunConfig:
        """The settings of a model with this many layers, of a folder and a number of steps that do not matter."""
        from ..training.config import load_config

        return load_config(None, self.settings(args, layers, "unused", 1))


def read_cells(args: argparse.Namespace, on_gpu: bool) -> list[Cell]:
    """The cells in the order they are measured.

    Raises:
        ValueError: an unknown geometry or precision, a window that is not a number of tokens, too few blocks, or settings that
            a cell's model cannot have.
    """
    precisions = (args.precisions or ("bf16" if on_gpu else "fp32")).split(",")
    for option, given, known in (
        ("geometry", args.geometry.split(","), GEOMETRIES),
        ("precisions", precisions, PRECISIONS),
    ):
        for name in given:
            if name not in known:
                raise ValueError(f"--{option} {name} is not one of {', '.join(known)}")
    if not all(word.isdigit() and int(word) >= 16 for word in args.windows.split(",")):
        raise ValueError(f"--windows {args.windows}: give numbers of tokens from 16 on, like 4096,8192")
    if args.blocks < PAIRS and args.geometry != DRY:
        raise ValueError(
            f"--blocks {args.blocks}: the median over fewer than {PAIRS} pairs of blocks says too little; give {PAIRS} or more, "
            f"or --geometry {DRY} for a dry run"
        )
    windows = [int(word) for word in args.windows.split(",")]
    cells = [Cell(g, w, p) for g in args.geometry.split(",") for w in windows for p in precisions]
    for cell in cells:
        cell.load(args, args.layers or GEOMETRIES[cell.geometry].layers)
    # Least used, and most memory beside the weights: last, so that a lack of time or memory costs these alone.
    return sorted(cells, key=lambda cell: cell.precision == "blockwise")


def documents_of(args: argparse.Namespace) -> str:
    """Where the documents' lengths come from, with a digest of them."""
    if not args.prefix:
        return "log-normal lengths"
    return f"lengths of {Path(args.prefix).name}.idx ({digest([read_index(args.prefix).lengths])})"


def asked_of(args: argparse.Namespace, gpu: str) -> dict[str, Any]:
    """All that a cell's numbers depend on beside the cell: a result with the same is the same measurement."""
    options = {name: getattr(args, name) for name in ASKED if name != "prefix"}
    return options | {
        "documents": documents_of(args),
        "GPU": gpu,
        "versions": machine("transformer-engine")["versions"],
    }


def fixed_layers(cells: Sequence[Cell], args: argparse.Namespace, gpu_memory: float | None) -> int:
    """Layers for cells of one geometry and window, alike in all precisions: the geometry's, or as many as fit into `gpu_memory` GiB by
    the estimate of planning/memory.py; at least one."""
    geometry = GEOMETRIES[cells[0].geometry]
    if args.layers:
        return int(args.layers)
    if gpu_memory is None:
        return geometry.layers
    # FP8 keeps its copies of the weights beside them, alike in all recipes.
    largest = max(cells, key=lambda cell: cell.fp8)
    run = largest.load(args, geometry.layers)

    def needed(layers: int) -> int:
        return memory(replace(run, model=replace(run.model, num_layers=layers)), geometry.vocabulary)[0].total

    return next((n for n in range(geometry.layers, 1, -1) if needed(n) <= SPARE * gpu_memory * GIB), 1)


class Bench:
    """A model of some layers with its arms, for the rest of this process."""

    def __init__(self, cell: Cell, args: argparse.Namespace, layers: int, folder: str, rounds: int) -> None:
        import torch

        from ..loss import gpt_loss
        from ..training.config import load_config
        from ..training.data import build_loader
        from ..training.trainer import Trainer
        from ..utils.ranks import be_single_rank

        steps = rounds * args.block_steps
        run = load_config(None, cell.settings(args, layers, folder, steps))
        lengths = read_index(args.prefix).lengths if args.prefix else None
        write_corpus(f"{folder}/corpus", steps * run.tokens_per_step + 1, GEOMETRIES[cell.geometry].vocabulary, lengths)
        be_single_rank()
        self.run = run
        self.trainer = Trainer(run, progress=False)
        trainer = self.trainer
        self.cuda = trainer.device.type == "cuda"
        self.peaks: dict[str, list[int]] = {name: [] for name in ARMS}  # bytes, a block
        self.first: dict[str, Step] = {}  # the first step of each arm
        self.sizes: list[np.ndarray] = []  # of the documents' pieces, a step of the exact arm
        self.data = {
            "exact": Arm(trainer.train_data, trainer.loss_func),
            "baseline": Arm(twin(trainer.train_data, weight_table=None), gpt_loss),
            "causal": Arm(twin(trainer.train_data, weight_table=None, emit_cu_seqlens=False), gpt_loss),
        }
        self.proof = prove_arms(
            self.data["exact"], self.data["baseline"], run.model.global_batch_size, self.data["causal"]
        )

        def block(name: str) -> Callable[[int], None]:
            loader = iter(build_loader(run, self.data[name].dataset, trainer.vocabulary, consumed=0))

            def steps(_: int) -> None:
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                for _ in range(args.block_steps):
                    self.step(name, self._watched(loader) if name == "exact" else loader)
                if self.cuda:
                    self.peaks[name].append(torch.cuda.max_memory_allocated())

            return steps

        self.blocks = {name: block(name) for name in ARMS}

    def step(self, name: str, loader: Iterator[Any]) -> None:
        """One training step of an arm."""
        self.trainer.loss_func = self.data[name].loss_func
        self.run.model.data.document_masking = name != "causal"
        if name in self.first:
            self.trainer.train_step(loader)
        else:
            self.first[name] = watch_step(self.trainer, loader)

    def _watched(self, loader: Iterator[Any]) -> Iterator[Any]:
        """The loader's micro-batches of one step, their pieces noted."""
        for _ in range(self.run.num_microbatches):
            batch = next(loader)
            self.sizes.append(np.diff(batch["boundaries"].numpy()))
            yield batch


def blocks_of(args: argparse.Namespace, seconds: float) -> int:
    """Counted blocks of each arm, where a round of blocks of all arms takes `seconds`."""
    return max(min(PAIRS, args.blocks), min(args.blocks, int(args.cell_seconds / seconds)))


def measure_trial(cell: Cell, args: argparse.Namespace, layers: int, folder: str) -> dict[str, Any]:
    """{"peak": bytes} of one block of each arm."""
    bench = Bench(cell, args, layers, folder, PAIRS)  # documents enough for a target in the tail
    interleaved(bench.blocks, 1)
    return {"peak": max(max(values) for values in bench.peaks.values())}


def measure_cell(
    cell: Cell,
    args: argparse.Namespace,
    layers: int,
    peak: float | None,
    folder: str,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Steps of the three arms in turn; times in s, memory in GiB, TFLOP/s a GPU.

    Args:
        save: takes the result before anything is profiled, which may fail.
    """
    bench = Bench(cell, args, layers, folder, args.blocks + WARMUP_BLOCKS + 1)
    interleaved(bench.blocks, WARMUP_BLOCKS - 1)
    prove_steps(bench.first, bench.proof)
    started = time.perf_counter()
    interleaved(bench.blocks, 1)
    rounds = blocks_of(args, time.perf_counter() - started)
    bench.peaks = {name: [] for name in ARMS}
    bench.sizes = []
    seconds = {name: values / args.block_steps for name, values in interleaved(bench.blocks, rounds).items()}
    run = bench.run
    geometry = GEOMETRIES[cell.geometry]
    tokens = run.tokens_per_step
    windows = run.model.global_batch_size
    pieces = np.concatenate(bench.sizes)
    pairs = causal_pairs(pieces) / (rounds * args.block_steps)
    flops = {
        "exact": geometry.step_flops(layers, tokens, round(pairs)),
        "causal": geometry.step_flops(layers, tokens, windows * causal_pairs([cell.window])),
    }
    flops["baseline"] = flops["exact"]
    result: dict[str, Any] = {
        "geometry": cell.geometry,
        "window": cell.window,
        "precision": cell.precision,
        "layers": layers,
        "process": os.getpid(),
        "proof": bench.proof,
        "parameters": sum(p.numel() for chunk in bench.trainer.model for p in chunk.parameters()),
        "step tokens": tokens,
        "micro-batch": run.model.micro_batch_size,
        "blocks": rounds,
        "block steps": args.block_steps,
        "pieces": {"median": float(np.median(pieces)), "mean": float(pieces.mean()), "largest": int(pieces.max())},
        "documents": documents_of(args),
        "attention share of FLOPs": {
            name: 1 - geometry.step_flops(layers, tokens, 0) / flops[name] for name in ("exact", "causal")
        },
        "peak TFLOP/s": peak,
        "overrides": args.overrides,
        "arms": {},
        **machine("transformer-engine"),
    }
    for name in ARMS:
        step = float(np.median(seconds[name]))
        rate = flops[name] / step / 1e12
        memory_used = [bytes_used / GIB for bytes_used in bench.peaks[name]]
        result["arms"][name] = {
            "step s": step,
            "tokens/s": tokens / step,
            "TFLOP/s": rate,
            "MFU": rate / peak if peak else None,
            "peak GiB": max(memory_used, default=None),
            "block s": seconds[name].tolist(),
            "block GiB": memory_used,
        }
    compare_arms(result)
    if args.profile:
        save(result)
        from ..training.data import build_loader
        from .profile import kernel_table, loss_end

        loader = iter(build_loader(run, bench.data["exact"].dataset, bench.trainer.vocabulary, consumed=0))
        result["profile"] = kernel_table(lambda: bench.step("exact", loader), bench.trainer.device)
        end = loss_end(bench.trainer)
        share = end["s"] * run.num_microbatches / result["arms"]["exact"]["step s"]
        result["loss end"] = end | {"share of the step": share}
    return result


def compare_arms(result: dict[str, Any]) -> None:
    """Add to a cell's result the ratios of its arms: medians over the pairs of blocks, with 95 % intervals."""
    arms = result["arms"]
    for name, (own, reference) in COMPARED.items():
        speed = np.array(arms[reference]["block s"]) / np.array(arms[own]["block s"])
        result[name] = {"ratio": float(np.median(speed)), "interval": interval(speed)}
        if arms[own]["block GiB"]:
            used = np.array(arms[own]["block GiB"]) / np.array(arms[reference]["block GiB"])
            result[name]["memory"] = {"ratio": float(np.median(used)), "interval": interval(used)}


def speed_against(own: dict[str, Any], other: dict[str, Any]) -> tuple[float, tuple[float, float]]:
    """Speed of one cell's exact arm over another's, measured one after the other: ratio of the medians, 95 % interval by bootstrap."""
    rng = np.random.default_rng(SEED)

    def medians(cell: dict[str, Any]) -> np.ndarray:
        values = np.array(cell["arms"]["exact"]["block s"]) / cell["step tokens"]
        return bootstrap.medians(values, RESAMPLES, rng)

    bounds = bootstrap.interval(medians(other) / medians(own))
    speeds = (cell["arms"]["exact"]["tokens/s"] for cell in (own, other))
    return next(speeds) / next(speeds), bounds


def rows_of(cells: list[dict[str, Any]]) -> list[Row]:
    """The table: speed and memory of EXACT against the bars, and beside them what masking and FP8 give."""
    rows = []
    for found in cells:
        cell = Cell(found["geometry"], found["window"], found["precision"])
        arms = found["arms"]
        for name, (own, reference) in COMPARED.items():
            bar = SPEED_BAR if own == "exact" else None
            ratio = found[name]["ratio"]
            bounds = tuple(found[name]["interval"])
            speeds = arms[own]["tokens/s"], arms[reference]["tokens/s"]
            said = f"ratio >= {bar}" if bar else ""
            rows.append(Row(f"{cell}: {name}", *speeds, "tokens/s", ratio, said, not bar or ratio >= bar, bounds))
            if bar and "memory" in found[name]:
                ratio = found[name]["memory"]["ratio"]
                bounds = tuple(found[name]["memory"]["interval"])
                used = arms[own]["peak GiB"], arms[reference]["peak GiB"]
                said = f"ratio <= {MEMORY_BAR}"
                rows.append(Row(f"{cell}: memory", *used, "GiB", ratio, said, ratio <= MEMORY_BAR, bounds))
        for other in cells:
            same = all(other[key] == found[key] for key in ("geometry", "window", "layers"))
            if cell.fp8 and other["precision"] == "bf16" and same:
                speeds = arms["exact"]["tokens/s"], other["arms"]["exact"]["tokens/s"]
                ratio, bounds = speed_against(found, other)
                rows.append(Row(f"{cell}: FP8 against bf16", *speeds, "tokens/s", ratio, "", True, bounds))
    return rows


class OutOfMemory(Exception):
    """A job's model did not fit into the device's memory."""


def run_job(spec: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
    """In the job's own process: write {"result": ...} or {"out of memory": the message}.

    What was written before an error counts: a cell's blocks that are timed need no other layers when its profile runs out of memory.
    """
    import torch

    from .ceiling import product

    args = argparse.Namespace(**spec["options"])
    written = False

    def save(result: dict[str, Any]) -> None:
        nonlocal written
        write({"result": result})
        written = True

    try:
        if spec["job"] == "device":
            peak = args.peak or product("bf16", 8192, 8192, 8192)["TFLOP/s"]
            total = torch.cuda.get_device_properties(0).total_memory
            save({"GPU": torch.cuda.get_device_name(0), "peak": peak, "memory": total / GIB})
            return
        cell = Cell(**spec["cell"])
        with tempfile.TemporaryDirectory() as folder:
            if spec["job"] == "trial":
                save(measure_trial(cell, args, spec["layers"], folder))
            else:
                save(measure_cell(cell, args, spec["layers"], spec["peak"], folder, save))
    except RuntimeError as error:
        # torch.OutOfMemoryError is one; cuBLAS, cuDNN and Transformer Engine say it in words of their own.
        if (
            written
            or not isinstance(error, torch.cuda.OutOfMemoryError)
            and not re.search(r"out of memory|ALLOC_FAILED", str(error), re.IGNORECASE)
        ):
            raise
        write({"out of memory": str(error).splitlines()[0]})


def start_job(spec: dict[str, Any]) -> Any:
    """Run a job in a process of its own, and return its result; "exit code" is in a cell's whose profile failed.

    Raises:
        OutOfMemory: with the device's message.
        ExactError: the process failed otherwise; its own messages are on standard error.
        KeyboardInterrupt: SIGINT came before there was a result.
    """
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder, "spec.json"), Path(folder, "result.json")
        write_text(where[0], json.dumps(spec))
        command = [sys.executable, "-W", "ignore", "-m", "exact_megatron.benchmark.throughput", *map(str, where)]
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which kills the job
        try:
            code = subprocess.run(command, stdout=sys.stderr).returncode
        except KeyboardInterrupt:
            code = INTERRUPTED
        finally:
            signal.signal(signal.SIGTERM, previous)
        if code == INTERRUPTED and not where[1].exists():
            raise KeyboardInterrupt
        if code and not where[1].exists():
            raise ExactError(
                f"the process that measures {spec.get('cell') or spec['job']} ended with exit code {code}; its messages are above"
            )
        found = json.loads(where[1].read_text())
    if "out of memory" in found:
        raise OutOfMemory(found["out of memory"])
    return found["result"] | ({"exit code": code} if code else {})


def trial_layers(cell: Cell, options: dict[str, Any], gpu_memory: float) -> int:
    """Layers that fit by the measured peaks of one and of two layers; the geometry's at most.

    Raises:
        OutOfMemory: not even one layer fits.
    """

    def peak(layers: int) -> int:
        return int(start_job({"job": "trial", "options": options, "cell": vars(cell), "layers": layers})["peak"])

    one = peak(TRIALS[0])
    try:
        two = peak(TRIALS[1])
    except OutOfMemory:
        return TRIALS[0]
    room = SPARE * gpu_memory * GIB - one
    return max(1, min(GEOMETRIES[cell.geometry].layers, 1 + int(room / max(1, two - one))))


def cell_that_fits(cell: Cell, options: dict[str, Any], layers: int, peak: float | None) -> dict[str, Any]:
    """A cell's result with `layers`, or with as many fewer as have to go; "repeated" says why.

    Raises:
        OutOfMemory: not even one layer fits.
    """
    repeated: list[str] = []
    while True:
        try:
            spec = {"job": "cell", "options": options, "cell": vars(cell), "layers": layers, "peak": peak}
            result: dict[str, Any] = start_job(spec)
            return result | {"repeated": repeated}
        except OutOfMemory as error:
            if layers == 1:
                raise
            repeated.append(f"{cell} with {layers} layers: {error}")
            layers -= 1
            print(f"throughput: {repeated[-1]}; again with {layers}", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    """Measure, or with --plan say how long that would take."""
    return print_plan(args) if args.plan else harness.run(args)


def print_plan(args: argparse.Namespace) -> int:
    """Print the cells, and how long they take by geometry.py's FLOPs at an assumed utilisation; whole windows count in every arm."""
    from rich.console import Console
    from rich.table import Table

    if not 0 < args.assume_mfu <= 1:
        raise ValueError(f"--assume-mfu {args.assume_mfu:g} must be above 0 and at most 1")
    cells = read_cells(args, True)
    peak = args.peak or PEAK_TFLOPS["bf16"]
    table = Table(title="benchmark throughput: plan, nothing is measured")
    for heading in ("cell", "layers", "PFLOP a step", "s a step", "blocks an arm", "s in all"):
        table.add_column(heading, justify="left" if heading == "cell" else "right")
    speed = args.assume_mfu * peak * 1e12

    def step_flops(cell: Cell, layers: int) -> float:
        run = cell.load(args, layers)
        windows = run.model.global_batch_size
        return GEOMETRIES[cell.geometry].step_flops(
            layers, run.tokens_per_step, windows * causal_pairs([run.model.data.seq_length])
        )

    others = {"device": args.assume_start}  # jobs that are no cell: seconds
    listed: list[dict[str, Any]] = []
    layers_of: dict[Cell, int] = {}
    for cell in cells:
        same = [c for c in cells if (c.geometry, c.window) == (cell.geometry, cell.window)]
        if same[0] not in layers_of:
            layers_of[same[0]] = fixed_layers(same, args, args.gpu_memory or GPU_MEMORY)
            for trial in TRIALS if args.trial_layers and not args.layers else ():
                seconds = len(ARMS) * args.block_steps * step_flops(same[-1], trial) / speed
                others[f"{same[-1]}, trial of {trial} layers"] = args.assume_start + seconds
        layers = layers_of[same[0]]
        flops = step_flops(cell, layers)
        step = flops / speed
        a_round = len(ARMS) * args.block_steps * step
        blocks = blocks_of(args, a_round)
        seconds = args.assume_start + (WARMUP_BLOCKS + blocks) * a_round
        listed.append(
            {"cell": str(cell), "layers": layers, "step FLOPs": flops, "step s": step, "blocks": blocks, "s": seconds}
        )
        table.add_row(str(cell), str(layers), f"{flops / 1e15:.3f}", f"{step:.2f}", str(blocks), f"{seconds:.0f}")
    for name, seconds in others.items():
        table.add_row(name, "", "", "", "", f"{seconds:.0f}")
    minutes = (sum(entry["s"] for entry in listed) + sum(others.values())) / 60
    said = (
        f"{len(cells)} cells, {minutes:.0f} minutes: computed from the geometries' FLOPs at an assumed {args.assume_mfu:g} of "
        f"{peak:g} TFLOP/s (--assume-mfu, --peak) and {args.assume_start:g} s to start a job (--assume-start); layers for "
        f"{args.gpu_memory or GPU_MEMORY:g} GiB (--gpu-memory)"
    )
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(table)
    console.print(said, soft_wrap=True)
    if args.json:
        listing = {"plan": said, "minutes": minutes, "cells": listed, "other jobs": others}
        write_text(args.json, json.dumps(listing, indent=1) + "\n")
    return 0


def measured_cells(path: str | None) -> list[dict[str, Any]]:
    """The cells of --cells; those without a proof that their arms differed, or without what was asked for, count for nothing.

    Raises:
        ValueError: a line is no JSON.
    """
    cells = []
    for number, line in enumerate(Path(path).read_text().splitlines() if path and Path(path).exists() else [], 1):
        try:
            cells.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON ({error}): remove the line, it was cut off") from error
    return [cell for cell in cells if "proof" in cell and "asked" in cell]


def measure(args: argparse.Namespace) -> Measured:
    """Every cell that is not in --cells yet, then the table of all."""
    from ..utils.ranks import is_rank

    if is_rank():
        raise ValueError("`exact-megatron benchmark throughput` is one rank: start it without torchrun or srun")
    import torch

    started = time.monotonic()
    on_gpu = torch.cuda.is_available()
    cells = read_cells(args, on_gpu)
    options = {name: getattr(args, name) for name in OPTIONS}
    device: dict[str, Any] = {"GPU": "none", "peak": args.peak, "memory": None}
    if on_gpu:
        device = start_job({"job": "device", "options": {"peak": args.peak}})
    gpu_memory = args.gpu_memory or device["memory"]
    asked = asked_of(args, device["GPU"])
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    differ: dict[tuple[str, int, str], str] = {}
    for known in measured_cells(args.cells):
        key = known["geometry"], known["window"], known["precision"]
        other = [name for name in asked if known["asked"].get(name) != asked[name]]
        if not other:
            found[key] = known
        else:
            differ[key] = ", ".join(f"{name} {known['asked'].get(name)}, not {asked[name]}" for name in other)
    for key, values in differ.items():
        if key not in found and Cell(*key) in cells:
            print(f"throughput: {Cell(*key)} of {args.cells} does not count here: {values}", file=sys.stderr)
    left: list[str] = []
    failed: list[str] = []
    ended: dict[str, Any] = {}
    with harness.written_at_interrupt(ended):
        for cell in cells:
            if (cell.geometry, cell.window, cell.precision) in found:
                continue
            if args.until and time.monotonic() - started > args.until:
                left.append(str(cell))
                continue
            print(f"throughput: {cell}", file=sys.stderr, flush=True)
            same = [c for c in cells if (c.geometry, c.window) == (cell.geometry, cell.window)]
            layers_of = [
                f["layers"] for f in found.values() if (f["geometry"], f["window"]) == (cell.geometry, cell.window)
            ]
            try:
                if layers_of and not args.layers:  # as in the cell's other precisions, also after a resume
                    layers = min(layers_of)
                elif args.trial_layers and on_gpu and not args.layers:
                    layers = trial_layers(same[-1], options, gpu_memory)
                else:
                    layers = fixed_layers(same, args, gpu_memory)
                result = cell_that_fits(cell, options, layers, device["peak"])
            except OutOfMemory as error:
                failed.append(f"{cell}: not even one layer fits, lower --micro-tokens: {error}")
                print(f"throughput: {failed[-1]}", file=sys.stderr, flush=True)
                continue
            except ExactError as error:
                failed.append(f"{cell}: {error}")
                print(f"throughput: {failed[-1]}", file=sys.stderr, flush=True)
                continue
            code = result.pop("exit code", 0)
            if code:
                result["no profile"] = f"the process ended with exit code {code} while it was profiled"
            result["asked"] = asked
            found[cell.geometry, cell.window, cell.precision] = result
            if args.cells:
                with open(args.cells, "a") as file:
                    file.write(json.dumps(result) + "\n")
            if code == INTERRUPTED:
                raise KeyboardInterrupt
    if not found and left:
        raise ValueError(f"--until {args.until} left no time for a single cell")
    failed += [f"{Cell(*key)}: {result['no profile']}" for key, result in found.items() if "no profile" in result]
    facts: dict[str, Any] = {
        "setup": (
            f"one rank on {'cuda' if on_gpu else 'cpu'}, each cell in a process of its own, {args.block_steps} steps a block, arms in turn "
            "on the same samples; ratio: median over pairs of blocks, 95 % interval by bootstrap; FP8 against bf16: the cells one after "
            "the other"
        ),
        "arms": {
            str(Cell(*key)): ", ".join(f"{name} {value}" for name, value in result["proof"].items())
            for key, result in found.items()
        },
    }
    if repeated := [words for result in found.values() for words in result["repeated"]]:
        facts["out of memory, repeated with a layer fewer"] = "; ".join(repeated)
    if left:
        facts["left for another call"] = f"{len(left)} of {len(cells)} cells (--until {args.until}): {', '.join(left)}"
    if failed:
        facts[harness.FAILED] = "; ".join(failed)
    return facts | ended, rows_of(list(found.values()))


def main(argv: Sequence[str]) -> int:
    spec, result = map(Path, argv)

    def write(found: dict[str, Any]) -> None:
        """Whole, whenever this process may end."""
        part = result.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(result)

    try:
        run_job(json.loads(spec.read_text()), write)
    except (ValueError, OSError, ExactError) as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    code = 1
    try:
        code = main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
    finally:
        # Without the interpreter's own end: multiprocessing would wait for loader processes, which ignore its SIGTERM. They end by
        # themselves when this process is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
