"""`exact-megatron benchmark qk-timing`: what model.qk_timing costs during its phase and after it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML; default: a small model on synthetic documents")
    parser.add_argument("--steps", type=int, default=100, help="of each arm")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example model.hidden_size=256")


def measure(args: argparse.Namespace) -> tuple[str, list[Any]]:
    """Steps during and after the phase of model.qk_timing and without it, of one model on the same batches; and its memory."""
    import torch

    from .benchmark import WARMUP, Row, describe_steps, interleaved, median_of_pairs, one_rank
    from .training.data import build_loader

    # The whole run is the phase, for one arm; the others ask for no step of it.
    forced = [
        "model.exact.enabled=false",
        "model.qk_timing.enabled=true",
        "model.qk_timing.hold=1",
        "model.qk_timing.anneal=0",
    ]
    peaks: dict[str, list[int]] = {}
    with one_rank(args, args.steps + WARMUP, forced) as (settings, trainer):
        timing, total = trainer.timing, settings.trainer.max_steps
        gpu = trainer.device.type == "cuda"

        def arm(name: str, with_timing: bool, done: int) -> Callable[[int], Any]:
            loader = iter(build_loader(settings, trainer.train_data, trainer.vocabulary, consumed=0))

            def step(_: int) -> None:
                trainer.timing, trainer.step = timing if with_timing else None, done
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                trainer.train_step(loader)
                if gpu:
                    peaks.setdefault(name, []).append(torch.cuda.max_memory_allocated())
                timing.before_step(total)  # leaves no hook to the next arm

            return step

        arms = {"during": arm("during", True, 0), "after": arm("after", True, total), "off": arm("off", False, 0)}
        interleaved(arms, WARMUP)
        seconds = interleaved(arms, args.steps)
        masters = sum(p.numel() for g in trainer.optimizer.param_groups for p in g["params"]) * 4
        setup = f"{timing.parameters:,} parameters slowed; {describe_steps(settings, trainer, args.steps)}"
    rows = []
    for name, words in (("during", "step during the phase"), ("after", "step after the phase")):
        ratio, interval = median_of_pairs(seconds[name] / seconds["off"])
        own, reference = (float(np.median(seconds[arm])) * 1e3 for arm in (name, "off"))
        rows.append(Row(words, own, reference, "ms", ratio, "", True, interval))
    held, whole = timing.held_bytes / 2**20, masters / 2**20
    rows.append(Row("copy held in the optimizer's step, of its masters", held, whole, "MiB", held / whole, "", True))
    if gpu:
        during, off = (max(peaks[name]) / 2**20 for name in ("during", "off"))
        rows.append(Row("peak memory during the phase", during, off, "MiB", during / off, "", True))
    return setup, rows
