"""`exact-megatron benchmark qk-timing`: what model.qk_timing costs during its phase and after it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..config import ExactError
from .arms import digest
from .harness import Measured, Row, interleaved, median_of_pairs
from .one_rank import WARMUP, describe_steps, one_rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML; default: a small model on synthetic documents")
    parser.add_argument("--steps", type=int, default=100, help="of each arm")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example model.hidden_size=256")


@dataclass(frozen=True)
class Seen:
    """An arm's first step: the factor of the queries' and keys' rate in its line, hooks in the optimizer, digest of the tokens."""

    factor: float | None
    hooked: bool
    tokens: str


def prove_phases(during: Seen, after: Seen, off: Seen) -> dict[str, Any]:
    """Prove that `during` is slowed and the others are not, on the same tokens; returns what was seen, for the result.

    Raises:
        ExactError: they do not differ as they must.
    """
    found = {"during": during, "after": after, "off": off}
    wrong = []
    if during.factor is None or not during.factor < 1 or not during.hooked:
        wrong.append(
            f"the arm during the phase has the factor {during.factor} and hooks {during.hooked}: it is not slowed"
        )
    if after.factor != 1 or after.hooked:
        wrong.append(
            f"the arm after the phase has the factor {after.factor} and hooks {after.hooked}: it is slowed still, or not timed"
        )
    if off.factor is not None or off.hooked:
        wrong.append(f"the arm without model.qk_timing has the factor {off.factor} and hooks {off.hooked}")
    if len({seen.tokens for seen in found.values()}) > 1:
        wrong.append("the arms' first batches differ")
    if wrong:
        raise ExactError(f"with and without model.qk_timing cannot be compared: {'; '.join(wrong)}")
    return {name: ", ".join(f"{key} {value}" for key, value in asdict(seen).items()) for name, seen in found.items()}


class Bench:
    """One model's steps with and without its timing, on the same batches.

    Attributes:
        first: what the first step of each arm, not counted, showed.
        peaks: bytes of memory, a step of each arm; none on a CPU.
    """

    def __init__(self, settings: Any, trainer: Any) -> None:
        self.settings, self.trainer = settings, trainer
        self.timing = trainer.timing
        self.gpu = trainer.device.type == "cuda"
        self.first: dict[str, Seen] = {}
        self.peaks: dict[str, list[int]] = {}

    def arm(self, name: str, with_timing: bool, done: int) -> Callable[[int], None]:
        """A step of an arm that has `done` steps behind it, each time it is called; the first is taken here."""
        from ..training.data import build_loader

        loader = iter(build_loader(self.settings, self.trainer.train_data, self.trainer.vocabulary, consumed=0))
        tokens: list[Any] = []

        def watched() -> Iterator[Any]:
            for batch in loader:
                tokens.append(batch["tokens"])
                yield batch

        line, active = self._step(with_timing, done, watched())
        self.first[name] = Seen(line.get("qk_factor"), active, digest(tokens))

        def step(_: int) -> None:
            import torch

            if self.gpu:
                torch.cuda.reset_peak_memory_stats()
            self._step(with_timing, done, loader)
            if self.gpu:
                self.peaks.setdefault(name, []).append(torch.cuda.max_memory_allocated())

        return step

    def _step(self, with_timing: bool, done: int, loader: Iterator[Any]) -> tuple[dict[str, Any], bool]:
        """Its line of metrics, and whether the optimizer was hooked in it."""
        self.trainer.timing = self.timing if with_timing else None
        self.trainer.step = done
        line = self.trainer.train_step(loader)
        active = self.timing.active
        self.timing.before_step(self.settings.trainer.max_steps)  # leaves no hook to the next arm
        return line, active


def measure(args: argparse.Namespace) -> Measured:
    """Steps during and after the phase of model.qk_timing and without it, of one model on the same batches; and its memory."""
    # The whole run is the phase, for one arm; the others ask for no step of it.
    forced = [
        "model.exact.enabled=false",
        "model.qk_timing.enabled=true",
        "model.qk_timing.hold=1",
        "model.qk_timing.anneal=0",
    ]
    with one_rank(args, args.steps + WARMUP, forced) as (settings, trainer):
        bench = Bench(settings, trainer)
        total = settings.trainer.max_steps
        arms = {
            "during": bench.arm("during", True, 0),
            "after": bench.arm("after", True, total),
            "off": bench.arm("off", False, 0),
        }
        proof = prove_phases(**bench.first)
        interleaved(arms, WARMUP - 1)
        seconds = interleaved(arms, args.steps)
        masters = sum(p.numel() for g in trainer.optimizer.param_groups for p in g["params"]) * 4
        setup = f"{bench.timing.parameters:,} parameters slowed; {describe_steps(settings, trainer, args.steps)}"
    return {"setup": setup, "arms": proof}, _rows(bench, seconds, masters)


def _rows(bench: Bench, seconds: dict[str, np.ndarray], masters: int) -> list[Row]:
    """Times of the arms in pairs; memory that the timing holds beside `masters` bytes of master weights, and peaks on a GPU."""
    rows = []
    for name, words in (("during", "step during the phase"), ("after", "step after the phase")):
        ratio, interval = median_of_pairs(seconds[name] / seconds["off"])
        own, reference = (float(np.median(seconds[arm])) * 1e3 for arm in (name, "off"))
        rows.append(Row(words, own, reference, "ms", ratio, "", True, interval))
    held, whole = bench.timing.held_bytes / 2**20, masters / 2**20
    rows.append(Row("copy held in the optimizer's step, of its masters", held, whole, "MiB", held / whole, "", True))
    if bench.gpu:
        during, off = (max(bench.peaks[name]) / 2**20 for name in ("during", "off"))
        rows.append(Row("peak memory during the phase", during, off, "MiB", during / off, "", True))
    return rows
