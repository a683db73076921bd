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


def measure(args: argparse.Namespace) -> Measured:
    """Steps during and after the phase of model.qk_timing and without it, of one model on the same batches; and its memory."""
    import torch

    from ..training.data import build_loader

    # The whole run is the phase, for one arm; the others ask for no step of it.
    forced = [
        "model.exact.enabled=false",
        "model.qk_timing.enabled=true",
        "model.qk_timing.hold=1",
        "model.qk_timing.anneal=0",
    ]
    peaks: dict[str, list[int]] = {}
    first: dict[str, Seen] = {}
    with one_rank(args, args.steps + WARMUP, forced) as (settings, trainer):
        timing = trainer.timing
        total = settings.trainer.max_steps
        gpu = trainer.device.type == "cuda"

        def arm(name: str, with_timing: bool, done: int) -> Callable[[int], Any]:
            loader = iter(build_loader(settings, trainer.train_data, trainer.vocabulary, consumed=0))

            def prepare() -> None:
                trainer.timing = timing if with_timing else None
                trainer.step = done
                if gpu:
                    torch.cuda.reset_peak_memory_stats()

            def step(_: int) -> None:
                prepare()
                trainer.train_step(loader)
                if gpu:
                    peaks.setdefault(name, []).append(torch.cuda.max_memory_allocated())
                timing.before_step(total)  # leaves no hook to the next arm

            def look() -> None:
                """The first step, uncounted."""
                prepare()
                tokens: list[Any] = []

                def watched() -> Iterator[Any]:
                    for batch in loader:
                        tokens.append(batch["tokens"])
                        yield batch

                line = trainer.train_step(watched())
                first[name] = Seen(line.get("qk_factor"), timing.active, digest(tokens))
                timing.before_step(total)

            look()
            return step

        arms = {"during": arm("during", True, 0), "after": arm("after", True, total), "off": arm("off", False, 0)}
        proof = prove_phases(**first)
        interleaved(arms, WARMUP - 1)
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
    return {"setup": setup, "arms": proof}, rows
