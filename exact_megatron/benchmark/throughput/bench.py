"""One model with the three arms of a cell: their proof, their timed blocks of steps, and the profile."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ...packing import read_index
from ...planning.flops import causal_pairs
from ...utils.environment import GIB, environment
from ..arms import Arm, Step, prove_arms, prove_steps, watch_step
from ..geometry import GEOMETRIES
from ..harness import interleaved
from ..one_rank import copy_dataset
from ..synthetic import write_corpus
from .cells import PAIRS, Cell, Result, blocks_of, documents_of
from .results import compare_arms

ARMS = ("exact", "baseline", "causal")
WARMUP_BLOCKS = 2  # uncounted, of each arm


class Bench:
    """A model of some layers with its arms, for the rest of this process.

    Raises:
        ExactError: the arms' data or loss functions do not differ as they must.
    """

    def __init__(self, cell: Cell, args: argparse.Namespace, layers: int, folder: str, rounds: int) -> None:
        from ...loss import gpt_loss
        from ...training.config import load_config
        from ...training.trainer import Trainer
        from ...utils.ranks import be_single_rank

        steps = rounds * args.block_steps
        run = load_config(None, cell.settings(args, layers, folder, steps))
        lengths = read_index(args.prefix).lengths if args.prefix else None
        write_corpus(f"{folder}/corpus", steps * run.tokens_per_step + 1, GEOMETRIES[cell.geometry].vocabulary, lengths)
        be_single_rank()
        self.cell, self.args, self.layers = cell, args, layers
        self.run = run
        self.trainer = Trainer(run, progress=False)
        trainer = self.trainer
        self.cuda = trainer.device.type == "cuda"
        self.peaks: dict[str, list[int]] = {name: [] for name in ARMS}  # bytes, a block
        self.first: dict[str, Step] = {}  # the first step of each arm
        self.segments: list[np.ndarray] = []  # their lengths, a micro-batch of the exact arm
        self.data = {
            "exact": Arm(trainer.train_data, trainer.loss_func),
            "baseline": Arm(copy_dataset(trainer.train_data, weight_table=None), gpt_loss),
            "causal": Arm(copy_dataset(trainer.train_data, weight_table=None, emit_cu_seqlens=False), gpt_loss),
        }
        self.proof = prove_arms(
            self.data["exact"], self.data["baseline"], run.model.global_batch_size, self.data["causal"]
        )
        self.blocks = {name: self._block(name) for name in ARMS}

    def loader(self, name: str) -> Iterator[Any]:
        """The micro-batches of an arm, from its first sample on."""
        from ...training.data import build_loader

        return iter(build_loader(self.run, self.data[name].dataset, self.trainer.vocabulary, consumed=0))

    def step(self, name: str, loader: Iterator[Any]) -> None:
        """One training step of an arm."""
        self.trainer.loss_func = self.data[name].loss_func
        self.run.model.data.document_masking = name != "causal"
        if name in self.first:
            self.trainer.train_step(loader)
        else:
            self.first[name] = watch_step(self.trainer, loader)

    def timed(self) -> dict[str, np.ndarray]:
        """Seconds[blocks] a step of each arm, after uncounted blocks in which the first steps are proved.

        Raises:
            ExactError: the first steps did not read and do what their arms are for.
        """
        interleaved(self.blocks, WARMUP_BLOCKS - 1)
        prove_steps(self.first, self.proof)
        started = time.perf_counter()
        interleaved(self.blocks, 1)
        rounds = blocks_of(self.args, time.perf_counter() - started)
        self.peaks = {name: [] for name in ARMS}
        self.segments = []
        return {name: values / self.args.block_steps for name, values in interleaved(self.blocks, rounds).items()}

    def _block(self, name: str) -> Callable[[int], None]:
        import torch

        loader = self.loader(name)

        def steps(_: int) -> None:
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            for _ in range(self.args.block_steps):
                self.step(name, self._watched(loader) if name == "exact" else loader)
            if self.cuda:
                self.peaks[name].append(torch.cuda.max_memory_allocated())

        return steps

    def _watched(self, loader: Iterator[Any]) -> Iterator[Any]:
        """The loader's micro-batches of one step, the lengths of their segments noted."""
        for _ in range(self.run.num_microbatches):
            batch = next(loader)
            self.segments.append(np.diff(batch["boundaries"].numpy()))
            yield batch


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
    save: Callable[[Result], None],
) -> Result:
    """Steps of the three arms in turn; times in s, memory in GiB, TFLOP/s a GPU.

    Args:
        peak: TFLOP/s that MFU is a share of.
        save: takes the result before anything is profiled, which may fail.
    """
    bench = Bench(cell, args, layers, folder, args.blocks + WARMUP_BLOCKS + 1)
    seconds = bench.timed()
    flops = _step_flops(bench, rounds=len(seconds["exact"]))
    result = _describe(bench, flops) | {"blocks": len(seconds["exact"]), "peak TFLOP/s": peak, "arms": {}}
    for name in ARMS:
        step = float(np.median(seconds[name]))
        rate = flops[name] / step / 1e12
        memory_used = [bytes_used / GIB for bytes_used in bench.peaks[name]]
        result["arms"][name] = {
            "step s": step,
            "tokens/s": bench.run.tokens_per_step / step,
            "TFLOP/s": rate,
            "MFU": rate / peak if peak else None,
            "peak GiB": max(memory_used, default=None),
            "block s": seconds[name].tolist(),
            "block GiB": memory_used,
        }
    compare_arms(result)
    if args.profile:
        save(result)
        result |= _profile(bench, result["arms"]["exact"]["step s"])
    return result


def _step_flops(bench: Bench, rounds: int) -> dict[str, float]:
    """FLOPs of a step of each arm: attention inside the segments that were read, or over whole windows."""
    run, geometry = bench.run, GEOMETRIES[bench.cell.geometry]
    masked = causal_pairs(np.concatenate(bench.segments)) / (rounds * bench.args.block_steps)
    pairs = {
        "exact": round(masked),
        "baseline": round(masked),
        "causal": run.model.global_batch_size * causal_pairs([bench.cell.window]),
    }
    return {name: geometry.step_flops(bench.layers, run.tokens_per_step, pairs[name]) for name in ARMS}


def _describe(bench: Bench, flops: dict[str, float]) -> Result:
    """What was measured: the cell, its model, its data, and the machine."""
    cell, run = bench.cell, bench.run
    segments = np.concatenate(bench.segments)
    without = GEOMETRIES[cell.geometry].step_flops(bench.layers, run.tokens_per_step, 0)
    return {
        "geometry": cell.geometry,
        "window": cell.window,
        "precision": cell.precision,
        "layers": bench.layers,
        "process": os.getpid(),
        "proof": bench.proof,
        "parameters": sum(p.numel() for chunk in bench.trainer.model for p in chunk.parameters()),
        "step tokens": run.tokens_per_step,
        "micro-batch": run.model.micro_batch_size,
        "block steps": bench.args.block_steps,
        "segments": {
            "median": float(np.median(segments)),
            "mean": float(segments.mean()),
            "largest": int(segments.max()),
        },
        "documents": documents_of(bench.args),
        "attention share of FLOPs": {name: 1 - without / flops[name] for name in ("exact", "causal")},
        "overrides": bench.args.overrides,
        **environment("transformer-engine"),
    }


def _profile(bench: Bench, step_seconds: float) -> Result:
    """The kernels of a step of the exact arm, and the loss end alone with its share of a step of `step_seconds`."""
    from ..profile import kernel_table, loss_end

    loader = bench.loader("exact")
    kernels = kernel_table(lambda: bench.step("exact", loader), bench.trainer.device)
    end = loss_end(bench.trainer)
    share = end["s"] * bench.run.num_microbatches / step_seconds
    return {"profile": kernels, "loss end": end | {"share of the step": share}}
