"""What a cell of the throughput benchmark is, which cells a command asks for, and the file of measured ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...packing import read_index
from ...planning.memory import memory
from ...utils.environment import GIB, environment
from ...utils.files import json_lines
from ..arms import digest
from ..geometry import GEOMETRIES
from ..one_rank import STEP_FORCED

if TYPE_CHECKING:
    from ...training.schema import RunConfig

PRECISIONS = ("fp32", "bf16", "delayed", "tensorwise", "blockwise")
PAIRS = 8  # counted blocks of each arm, at least
DRY = "tiny"  # the geometry of dry runs on a CPU, of as few blocks as are asked for
SPARE = 0.85  # of the device's memory may be filled by the estimate of planning/memory.py, which knows no workspaces and no fragments
# Of the options, what a job needs, and what else decides how many layers or which peak it gets.
OPTIONS = "prefix step_tokens micro_tokens blocks block_steps cell_seconds profile overrides".split()
ASKED = [*OPTIONS, *"layers trial_layers gpu_memory peak".split()]

Result = dict[str, Any]  # of a measured cell, as bench.py makes it


@dataclass(frozen=True)
class Cell:
    """What one model is built for."""

    geometry: str
    window: int
    precision: str

    @classmethod
    def of(cls, result: Result) -> Cell:
        return cls(result["geometry"], result["window"], result["precision"])

    def __str__(self) -> str:
        window = f"{self.window // 1024}K" if self.window >= 1024 else str(self.window)
        return f"{self.geometry} {window} {self.precision}"

    @property
    def fp8(self) -> bool:
        return self.precision in ("delayed", "tensorwise", "blockwise")

    @property
    def model(self) -> tuple[str, int]:
        """What cells with the same number of layers share: geometry and window."""
        return self.geometry, self.window

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
        from ...training.config import load_config

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


def blocks_of(args: argparse.Namespace, seconds: float) -> int:
    """Counted blocks of each arm, where a round of blocks of all arms takes `seconds`."""
    return max(min(PAIRS, args.blocks), min(args.blocks, int(args.cell_seconds / seconds)))


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
        "versions": environment("transformer-engine")["versions"],
    }


def measured_cells(path: str | None) -> list[Result]:
    """The cells of --cells; those without a proof that their arms differed, or without what was asked for, count for nothing.

    Raises:
        ValueError: a line is no JSON.
    """
    results = json_lines(path) if path else []
    return [result for result in results if "proof" in result and "asked" in result]
