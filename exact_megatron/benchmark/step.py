"""A training step with EXACT against the unweighted one with the same masks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from .arms import Arm, Step, prove_arms, prove_steps, watch_step
from .harness import Measured, Row, interleaved, median_of_pairs
from .one_rank import WARMUP, copy_dataset, describe_steps, one_rank


def measure_step(args: argparse.Namespace) -> Measured:
    """Steps with and without EXACT, of one model on the same batches with the same document masks."""
    from ..loss import gpt_loss
    from ..training.data import build_loader

    with one_rank(args, args.steps + WARMUP, ["model.exact.enabled=true"]) as (settings, trainer):
        first: dict[str, Step] = {}

        def arm(name: str, own: Arm) -> Callable[[int], Any]:
            loader = iter(build_loader(settings, own.dataset, trainer.vocabulary, consumed=0))

            def step(_: int) -> None:
                trainer.loss_func = own.loss_func
                if name in first:
                    trainer.train_step(loader)
                else:
                    first[name] = watch_step(trainer, loader)

            return step

        exact = Arm(trainer.train_data, trainer.loss_func)
        baseline = Arm(copy_dataset(trainer.train_data, weight_table=None), gpt_loss)
        proof = prove_arms(exact, baseline, settings.model.global_batch_size)
        arms = {"exact": arm("exact", exact), "baseline": arm("baseline", baseline)}
        interleaved(arms, WARMUP)
        prove_steps(first, proof)
        seconds = interleaved(arms, args.steps)
        setup = describe_steps(settings, trainer, args.steps)
    ratio, interval = median_of_pairs(seconds["baseline"] / seconds["exact"])
    own, reference = (settings.tokens_per_step / float(np.median(seconds[name])) for name in ("exact", "baseline"))
    row = Row("training step", own, reference, "tokens/s", ratio, "ratio >= 0.99", ratio >= 0.99, interval)
    return {"setup": setup, "arms": proof}, [row]
