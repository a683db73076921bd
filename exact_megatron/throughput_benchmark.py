"""`exact-megatron benchmark throughput`: EXACT against the same run without it, at the sizes people train.

One rank. A cell is a geometry, a window and a precision. In it one model takes blocks of whole training steps (loader, forward,
backward, optimizer) in turn for three arms, on the same samples: exact; baseline, the same document masks without weights;
and causal, without weights and with every sample as one document. Documents are random tokens with log-normal or given lengths.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .benchmark import STEP_FORCED, Row, interleaved, interval, twin, write_corpus
from .geometry import GEOMETRIES, causal_pairs
from .machine import machine
from .packing import read_index

ARMS = ("exact", "baseline", "causal")
PRECISIONS = ("fp32", "bf16", "delayed", "tensorwise", "blockwise")
SPEED_BAR, MEMORY_BAR = 0.995, 1.01
WARMUP_BLOCKS = 2  # uncounted, of each arm
TRIALS = (1, 2)  # layers, measured to find how many fit
SPARE = 0.92  # of the device's memory may be filled: fragments and what is allocated outside torch take the rest
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--geometry", default="tiny", help=f"comma-separated: {', '.join(GEOMETRIES)}")
    add("--windows", default="4096,8192,16384,32768", help="comma-separated, in tokens")
    add(
        "--precisions",
        help=f"comma-separated: {', '.join(PRECISIONS)} (the last three are FP8); default: bf16, fp32 on a CPU",
    )
    add("--layers", type=int, help="default: the geometry's, or as many as fit into the GPU's memory")
    add("--prefix", help="take the documents' lengths from PREFIX.idx; default: log-normal ones")
    add("--step-tokens", type=int, default=32768, help="of an optimizer step, at least a window")
    add("--micro-tokens", type=int, default=8192, help="of a micro-batch, at least a window")
    add("--blocks", type=int, default=12, help="counted blocks of each arm, at most")
    add("--block-steps", type=int, default=2, help="optimizer steps of a block")
    add("--cell-seconds", type=int, default=40, help="fewer blocks (4 at least) where they would take longer")
    add(
        "--peak",
        type=float,
        help="TFLOP/s that MFU is a share of; default: a bf16 product measured before the first cell",
    )
    add("--cells", metavar="FILE", help="append a JSON line a cell; cells that are in it are not measured again")
    add("--until", type=int, metavar="SECONDS", help="start no cell after so many seconds from the start")
    add("--profile", action="store_true", help="also a table of the kernels of a step, and the loss end alone")
    add("overrides", nargs="*", metavar="key=value", help="for example model.apply_rope_fusion=true")


@dataclass(frozen=True)
class Cell:
    """What one model is built for."""

    geometry: str
    window: int
    precision: str

    def __str__(self) -> str:
        return f"{self.geometry} {self.window // 1024}K {self.precision}" if self.window >= 1024 else (
            f"{self.geometry} {self.window} {self.precision}")  # fmt: skip

    def settings(self, args: argparse.Namespace, layers: int, folder: str, steps: int) -> list[str]:
        """Overrides for the native runner."""
        micro = max(1, args.micro_tokens // self.window)
        batch = max(1, args.step_tokens // (micro * self.window)) * micro
        fp8 = self.precision in ("delayed", "tensorwise", "blockwise")
        made = [
            *GEOMETRIES[self.geometry].overrides(layers),
            f"model.data.seq_length={self.window}", f"model.micro_batch_size={micro}", f"model.global_batch_size={batch}",
            f"trainer.precision={'32' if self.precision == 'fp32' else 'bf16'}", f"model.fp8={str(fp8).lower()}",
            "model.optim.lr=1e-5", "model.data.splits_string=1", f"model.data.data_prefix=[{folder}/corpus]",
            "exp_manager.create_tensorboard_logger=false",
        ]  # fmt: skip
        if fp8:  # blockwise is E4M3 both ways in Transformer Engine's own default
            made += [
                f"model.fp8_recipe={self.precision}",
                f"model.fp8_hybrid={str(self.precision != 'blockwise').lower()}",
            ]
        forced = [f"model.data.index_mapping_dir={folder}/cache", f"exp_manager.exp_dir={folder}/run"]
        return [*made, *args.overrides, *STEP_FORCED, *forced, f"trainer.max_steps={steps}"]


def read_cells(args: argparse.Namespace, on_gpu: bool) -> list[Cell]:
    """The cells in the order they are measured.

    Raises:
        ValueError: an unknown geometry or precision, or a window that is not a number of tokens.
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
    windows = [int(word) for word in args.windows.split(",")]
    return [Cell(g, w, p) for g in args.geometry.split(",") for w in windows for p in precisions]


def documents_of(args: argparse.Namespace) -> str:
    return f"lengths of {Path(args.prefix).name}.idx" if args.prefix else "log-normal lengths"


class Bench:
    """A model of some layers with the three arms; `close` before the next is built."""

    def __init__(self, cell: Cell, args: argparse.Namespace, layers: int, folder: str, rounds: int) -> None:
        import torch

        from .loss import gpt_loss
        from .training.config import load_config
        from .training.data import build_loader
        from .training.trainer import Trainer

        steps = rounds * args.block_steps
        run = load_config(None, cell.settings(args, layers, folder, steps))
        Path(folder).mkdir(parents=True)
        lengths = read_index(args.prefix).lengths if args.prefix else None
        self.lengths = write_corpus(
            f"{folder}/corpus", steps * run.tokens_per_step + 1, GEOMETRIES[cell.geometry].vocabulary, lengths
        )
        self.run, self.layers, self.block_steps = run, layers, args.block_steps
        self.trainer = trainer = Trainer(run, progress=False)
        self.cuda = trainer.device.type == "cuda"
        self.peaks: dict[str, int] = dict.fromkeys(ARMS, 0)
        self.hooked = trainer.loss_func
        self.sizes: list[np.ndarray] = []  # of the documents' pieces, a step of the exact arm

        def arm(name: str, dataset: Any, loss_func: Any, masked: bool) -> Callable[[int], None]:
            loader = iter(build_loader(run, dataset, trainer.vocabulary, consumed=0))

            def block(_: int) -> None:
                trainer.loss_func, run.model.data.document_masking = loss_func, masked
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                for _ in range(args.block_steps):
                    trainer.train_step(self._watched(loader) if name == "exact" else loader)
                if self.cuda:
                    self.peaks[name] = max(self.peaks[name], torch.cuda.max_memory_allocated())

            return block

        data = trainer.train_data
        self.arms = {
            "exact": arm("exact", data, self.hooked, True),
            "baseline": arm("baseline", twin(data, weight_table=None), gpt_loss, True),
            "causal": arm("causal", twin(data, weight_table=None, emit_cu_seqlens=False), gpt_loss, False),
        }
        self.loader = iter(build_loader(run, data, trainer.vocabulary, consumed=0))  # for the profile

    def _watched(self, loader: Iterator[Any]) -> Iterator[Any]:
        """The loader's micro-batches of one step, their pieces noted."""
        for _ in range(self.run.num_microbatches):
            batch = next(loader)
            self.sizes.append(np.diff(batch["boundaries"].numpy()))
            yield batch

    def close(self) -> None:
        import torch

        from .training.trainer import shutdown

        if self.run.model.fp8:  # what delayed scaling keeps of this model's layers
            from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

            from .attention import _te_module

            _te_module.cache_clear()
            FP8GlobalStateManager.reset()
        del self.trainer, self.arms, self.hooked, self.loader
        shutdown()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def layers_that_fit(cell: Cell, args: argparse.Namespace, folder: str) -> int:
    """Layers that fit into the device's memory, by the peaks of one and of two layers; the geometry's at most."""
    import torch

    peaks = []
    for layers in TRIALS:
        bench = Bench(cell, args, layers, f"{folder}/{layers}", 1)
        for arm in bench.arms.values():
            arm(0)
        peaks.append(max(bench.peaks.values()))
        bench.close()
    room = SPARE * torch.cuda.get_device_properties(0).total_memory - peaks[0]
    return max(1, min(GEOMETRIES[cell.geometry].layers, 1 + int(room / max(1, peaks[1] - peaks[0]))))


def measure_cell(cell: Cell, args: argparse.Namespace, layers: int, peak: float | None, folder: str) -> dict[str, Any]:
    """Steps of the three arms in turn; times in s, memory in GiB, TFLOP/s a GPU."""
    most = args.blocks + WARMUP_BLOCKS
    bench = Bench(cell, args, layers, folder, most + 1)
    interleaved(bench.arms, WARMUP_BLOCKS - 1)
    started = time.perf_counter()
    interleaved(bench.arms, 1)
    rounds = max(min(4, args.blocks), min(args.blocks, int(args.cell_seconds / (time.perf_counter() - started))))
    bench.peaks, bench.sizes = dict.fromkeys(ARMS, 0), []
    seconds = {name: values / args.block_steps for name, values in interleaved(bench.arms, rounds).items()}
    run, geometry = bench.run, GEOMETRIES[cell.geometry]
    tokens, windows = run.tokens_per_step, run.model.global_batch_size
    pieces = np.concatenate(bench.sizes)
    pairs = causal_pairs(pieces) / (rounds * args.block_steps)
    flops = {
        "exact": geometry.step_flops(layers, tokens, round(pairs)),
        "causal": geometry.step_flops(layers, tokens, windows * causal_pairs([cell.window])),
    }
    flops["baseline"] = flops["exact"]
    result: dict[str, Any] = {
        "geometry": cell.geometry, "window": cell.window, "precision": cell.precision, "layers": layers,
        "parameters": sum(p.numel() for chunk in bench.trainer.model for p in chunk.parameters()),
        "step tokens": tokens, "micro-batch": run.model.micro_batch_size, "blocks": rounds, "block steps": args.block_steps,
        "pieces": {"median": float(np.median(pieces)), "mean": float(pieces.mean()), "largest": int(pieces.max())},
        "documents": documents_of(args),
        "attention share of FLOPs": {n: 1 - geometry.step_flops(layers, tokens, 0) / flops[n] for n in ("exact", "causal")},
        "peak TFLOP/s": peak, "overrides": args.overrides, "arms": {}, **machine(),
    }  # fmt: skip
    for name in ARMS:
        step = float(np.median(seconds[name]))
        rate = flops[name] / step / 1e12
        result["arms"][name] = {
            "step s": step, "tokens/s": tokens / step, "TFLOP/s": rate, "MFU": rate / peak if peak else None,
            "peak GiB": bench.peaks[name] / GIB if bench.cuda else None, "block s": seconds[name].tolist(),
        }  # fmt: skip
    for name, own, reference in (
        ("EXACT against baseline", "exact", "baseline"),
        ("masked against causal", "baseline", "causal"),
    ):
        ratios = seconds[reference] / seconds[own]
        result[name] = {"ratio": float(np.median(ratios)), "interval": interval(ratios)}
    if args.profile:
        from .device_profile import kernel_table, loss_end

        def profiled() -> None:
            bench.trainer.loss_func, run.model.data.document_masking = bench.hooked, True
            bench.trainer.train_step(bench.loader)

        result["profile"] = kernel_table(profiled, bench.trainer.device)
        end = loss_end(bench.trainer)
        micro_batches = run.num_microbatches
        result["loss end"] = end | {"share of the step": end["s"] * micro_batches / result["arms"]["exact"]["step s"]}
    bench.close()
    return result


def rows_of(cells: list[dict[str, Any]]) -> list[Row]:
    """The table: speed and memory of EXACT against the bars, and beside them what masking and FP8 give."""
    rows = []
    for found in cells:
        cell = str(Cell(found["geometry"], found["window"], found["precision"]))
        arms = found["arms"]
        for name, own, reference, bar in (
            ("EXACT against baseline", "exact", "baseline", SPEED_BAR), ("masked against causal", "baseline", "causal", None),
        ):  # fmt: skip
            ratio, bounds = found[name]["ratio"], tuple(found[name]["interval"])
            speeds = arms[own]["tokens/s"], arms[reference]["tokens/s"]
            said = f"ratio >= {bar}" if bar else ""
            rows.append(Row(f"{cell}: {name}", *speeds, "tokens/s", ratio, said, not bar or ratio >= bar, bounds))
            if bar and arms[own]["peak GiB"] is not None:
                memory = arms[own]["peak GiB"], arms[reference]["peak GiB"]
                ratio = memory[0] / memory[1]
                rows.append(
                    Row(f"{cell}: memory", *memory, "GiB", ratio, f"ratio <= {MEMORY_BAR}", ratio <= MEMORY_BAR)
                )
        for other in cells:
            same = all(other[key] == found[key] for key in ("geometry", "window", "layers"))
            if found["precision"] not in ("bf16", "fp32") and other["precision"] == "bf16" and same:
                speeds = arms["exact"]["tokens/s"], other["arms"]["exact"]["tokens/s"]
                rows.append(Row(f"{cell}: FP8 against bf16", *speeds, "tokens/s", speeds[0] / speeds[1], "", True))
    return rows


def measure(args: argparse.Namespace) -> tuple[str, list[Row]]:
    """Every cell that is not in --cells yet, then the table of all."""
    from .training.launch import be_single_rank, is_rank

    if is_rank():
        raise ValueError("`exact-megatron benchmark throughput` is one rank: start it without torchrun or srun")
    import torch

    from .device_profile import product

    started, on_gpu = time.monotonic(), torch.cuda.is_available()
    cells = read_cells(args, on_gpu)
    written = Path(args.cells).read_text().splitlines() if args.cells and Path(args.cells).exists() else []
    device = torch.cuda.get_device_name(0) if on_gpu else "none"
    found = {(c["geometry"], c["window"], c["precision"]): c for c in map(json.loads, written)
             if (c["GPU"], c["overrides"], c["documents"]) == (device, args.overrides, documents_of(args))}  # fmt: skip
    be_single_rank()
    peak = args.peak or (product("bf16", 8192, 8192, 8192)["TFLOP/s"] if on_gpu else None)
    layers: dict[tuple[str, int], int] = {}
    left = 0
    for cell in cells:
        if (cell.geometry, cell.window, cell.precision) in found:
            continue
        if args.until and time.monotonic() - started > args.until:
            left += 1
            continue
        same = (cell.geometry, cell.window)
        for known in found.values():  # as in the cell's other precisions, also after a resume
            if (known["geometry"], known["window"]) == same:
                layers[same] = known["layers"]
        print(f"throughput: {cell}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            if args.layers or not on_gpu:
                layers[same] = args.layers or GEOMETRIES[cell.geometry].layers
            elif same not in layers:
                largest = [c for c in cells if (c.geometry, c.window) == same][-1]  # FP8 keeps more beside the weights
                layers[same] = layers_that_fit(largest, args, folder)
            result = measure_cell(cell, args, layers[same], peak, f"{folder}/cell")
        found[cell.geometry, cell.window, cell.precision] = result
        if args.cells:
            with open(args.cells, "a") as file:
                file.write(json.dumps(result) + "\n")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not found:
        raise ValueError(f"--until {args.until} left no time for a single cell")
    setup = (
        f"one rank on {'cuda' if on_gpu else 'cpu'}, {args.block_steps} steps a block, arms in turn on the same samples; ratio: median "
        "over pairs of blocks, 95 % interval by bootstrap; FP8 against bf16: the cells one after the other"
    )
    if left:
        setup += f"; {left} of {len(cells)} cells are left for another call (--until {args.until})"
    return setup, rows_of(list(found.values()))
