"""Proof that the two arms of a comparison differ in EXACT's weights and in nothing else, given before either is timed or trained.

Benchmarks prove the data and the loss function they are about to run (`prove_arms`), then what the first step of each arm, not
counted, really read and did (`prove_steps`). A paired training proves what its configurations build:

    python -m exact_megatron.benchmark.arms OUT.json [--config FILE ...] [key=value ...]

builds the data of the configuration twice, with model.exact.enabled=true and =false, and writes the digests, or ends with code 2.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import ExactError
from ..utils.files import write_text

if TYPE_CHECKING:
    from ..training.schema import RunConfig

BATCHES = 64  # a batch without a target in the tail proves nothing: so many are looked at
DIFFERENCE = 1e-3  # of two weights, at least; what only marks the buckets differs by a rounding step


@dataclass(frozen=True)
class Arm:
    """What an arm reads, and the loss function that reads the samples' `loss_mask`."""

    dataset: Any
    loss_func: Any


def digest(arrays: Iterable[Any]) -> str:
    """16 hex digits that change with the values, types and shapes of the arrays or CPU tensors."""
    found = hashlib.sha256()
    for array in map(np.asarray, arrays):
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def fingerprint(arm: Arm, samples: Sequence[int]) -> dict[str, Any]:
    """What an arm has and reads in these samples.

    Returns:
        weight table: digest of the data's table, or None.
        loss: digest of the table that the hooked loss function reads, or None where it is not hooked.
        tokens: digest of tokens and labels.
        loss mask: digest.
        weights: float64[samples, S], the loss masks.
        plain: whether the loss mask is 0 or 1 everywhere.
        tail weights: number of different weights in the table's tail; 0 with alpha = 0, where all weights are 1.
        spread: largest less smallest weight of the table, among the effective contexts that its stream has.
        tail: number of targets with one of these weights.
        segments: number of the documents' parts in these samples; None where the samples carry no boundaries.
    """
    from ..dataset import members

    tables = [getattr(member, "weight_table", None) for member in members([arm.dataset])]
    table = tables[0]
    if len({t and t.digest for t in tables}) > 1:
        raise ExactError(f"the members of a blend have different weight tables: {[t and t.digest for t in tables]}")
    hook = getattr(arm.loss_func, "exact_loss", None)
    read = [arm.dataset[i] for i in samples]
    masks = [sample["loss_mask"].numpy() for sample in read]
    markers = np.empty(0, np.float32) if table is None else table.bucket_markers
    boundaries = [np.unique(sample["cu_seqlens"].numpy()) for sample in read if "cu_seqlens" in sample]
    return {
        "weight table": table and table.digest,
        "loss": None if hook is None else getattr(hook.table, "digest", "no table"),
        "tokens": digest(sample[key] for sample in read for key in ("tokens", "labels")),
        "loss mask": digest(masks),
        "weights": np.stack(masks).astype(np.float64),
        "plain": all(np.isin(mask, (0, 1)).all() for mask in masks),
        "tail weights": len(markers),
        "spread": 0.0 if table is None else float(np.ptp(table.lookup[table.counts > 0])),
        "tail": int(sum(np.isin(mask, markers).sum() for mask in masks)),
        "segments": sum(len(b) - 1 for b in boundaries) if boundaries else None,
    }


def prove_arms(exact: Arm, baseline: Arm, batch: int, unmasked: Arm | None = None) -> dict[str, Any]:
    """Prove on the first batches that `exact` is weighted and `baseline` is not, on the same tokens.

    Args:
        batch: samples of a batch. The proof is the first batch, of at most BATCHES, that has a target in the tail and loss masks
            that differ by DIFFERENCE or more, and with `unmasked` a sample of several segments.
        unmasked: a third arm, as `baseline` but with every sample as one document.

    Returns:
        Digests and numbers for the result: {"samples", "tokens", "weight table", "tail targets", "largest difference" of the loss
        masks, "loss mask of exact", "loss mask of baseline"}.

    Raises:
        ExactError: the arms do not differ as they must; says in what, and what to set.
    """
    count = min(BATCHES, len(exact.dataset) // batch)
    tail, largest = 0, 0.0
    for first in range(0, count * batch, batch):
        samples = range(first, first + batch)
        own, other = fingerprint(exact, samples), fingerprint(baseline, samples)
        where = f"samples {first} to {first + batch - 1}"
        _reject_unweighted(own)
        _reject_weighted(other, "baseline", where)
        if own["tokens"] != other["tokens"]:
            raise _vacuous(f"the arms read different tokens in {where}: give both the same data, seed and batch sizes")
        if unmasked is not None:
            third = fingerprint(unmasked, samples)
            _reject_weighted(third, "causal", where)
            if third["tokens"] != other["tokens"] or third["segments"] is not None or other["segments"] is None:
                raise _vacuous(f"the arm without document masks has other tokens or has boundaries in {where}")
        difference = float(np.abs(own["weights"] - other["weights"]).max())
        tail, largest = tail + own["tail"], max(largest, difference)
        if not own["tail"] or difference < DIFFERENCE:
            continue
        if unmasked is not None and other["segments"] == len(samples):
            continue
        return {
            "samples": f"{first} to {first + batch - 1}",
            "tokens": own["tokens"],
            "weight table": own["weight table"],
            "tail targets": own["tail"],
            "largest difference": round(difference, 6),
            "loss mask of exact": own["loss mask"],
            "loss mask of baseline": other["loss mask"],
        }
    looked = f"the first {count} batches of {batch} samples"
    if not tail:
        raise _vacuous(
            f"no target of {looked} lies in the tail, so that nothing is up-weighted: lower model.exact.tau, take longer "
            "documents, or train longer than a batch"
        )
    if largest < DIFFERENCE:
        raise _vacuous(
            f"the loss masks differ by at most {largest:.3g} in {looked}, at least {DIFFERENCE:g} is needed: raise model.exact.alpha"
        )
    raise _vacuous(
        f"every sample is a single segment in {looked} with a target in the tail, so that document masks change nothing: take "
        "shorter documents or a longer window"
    )


def _vacuous(problem: str) -> ExactError:
    return ExactError(f"EXACT and baseline cannot be compared: {problem}")


def _reject_unweighted(found: dict[str, Any]) -> None:
    if found["weight table"] is None:
        raise _vacuous("the data of the arm exact have no weight table: set model.exact.enabled=true in this arm")
    if found["loss"] != found["weight table"]:
        raise _vacuous(
            f"the data of the arm exact are weighted by table {found['weight table']}, its loss reads {found['loss']}: train with what "
            "ExactLoss.wrap(loss_func) returns"
        )
    if not found["tail weights"]:
        raise _vacuous("all weights of the arm exact are 1: set model.exact.alpha above 0")
    if found["spread"] < DIFFERENCE:
        raise _vacuous(
            f"the weights of the arm exact differ by {found['spread']:.3g}, at least {DIFFERENCE:g} is needed: raise "
            "model.exact.alpha or model.exact.gamma, or set model.exact.tau above 0"
        )


def _reject_weighted(found: dict[str, Any], name: str, where: str) -> None:
    if found["weight table"] is not None:
        raise _vacuous(
            f"the data of the arm {name} have the weight table {found['weight table']}: set model.exact.enabled=false"
        )
    if found["loss"] is not None:
        raise _vacuous(f"the loss function of the arm {name} is hooked: it takes the plain one")
    if not found["plain"]:
        raise _vacuous(f"the loss mask of the arm {name} has other values than 0 and 1 in {where}")


@dataclass(frozen=True)
class Step:
    """What one training step of an arm read and did.

    Attributes:
        tokens: digest of its micro-batches' tokens and labels.
        weights: whether their loss masks have other values than 0 and 1.
        boundaries: whether they carry the documents' boundaries.
        table: digest of the table that the loss hook read; None where the hook did not run in every micro-batch.
        hooked: micro-batches in which the loss hook ran.
        weighted: whether the step's exact_loss is another than its lm_loss.
    """

    tokens: str
    weights: bool
    boundaries: bool
    table: str | None
    hooked: int
    weighted: bool


def watch_step(trainer: Any, loader: Iterator[Any]) -> Step:
    """Train one step, of the arm that `trainer` is set to, and tell what it read and did. Slower than a step."""
    read: list[dict[str, Any]] = []

    def noted() -> Iterator[Any]:
        for batch in loader:
            read.append(batch)
            yield batch

    before = trainer.loss.batches
    line = trainer.train_step(noted())
    hooked, table = trainer.loss.batches - before, trainer.loss.table
    return Step(
        tokens=digest(batch[key] for batch in read for key in ("tokens", "labels")),
        weights=not all(np.isin(batch["loss_mask"].numpy(), (0, 1)).all() for batch in read),
        boundaries=any("boundaries" in batch for batch in read),
        table=table.digest if table and hooked == len(read) else None,
        hooked=hooked,
        weighted=line["exact_loss"] != line["lm_loss"],
    )


def prove_steps(steps: dict[str, Step], proof: dict[str, Any]) -> None:
    """Prove that the arms were trained as what `prove_arms` found: `exact`, `baseline` and, where it is there, `causal`.

    Args:
        steps: the first step of each arm.
        proof: what prove_arms returned.

    Raises:
        ExactError: an arm trained with another's data or loss.
    """
    wrong = []
    for name, step in steps.items():
        masked = name != "causal"
        if step.boundaries != masked:
            wrong.append(f"{name} has {'no ' * masked}boundaries of documents")
        if name == "exact":
            if step.table != proof["weight table"]:
                wrong.append(f"{name} is weighted by table {step.table} in its loss, not by {proof['weight table']}")
            if step.weighted != step.weights:
                wrong.append(
                    f"{name} has {'' if step.weights else 'no '}weights in its batch, and its loss is "
                    f"{'' if step.weighted else 'not '}weighted"
                )
        elif step.hooked or step.weights or step.weighted:
            wrong.append(
                f"the loss hook ran in {step.hooked} micro-batches of {name}, weights in its batch: {step.weights}"
            )
    if len({step.tokens for step in steps.values()}) > 1:
        wrong.append("the arms read different tokens")
    if wrong:
        raise _vacuous(f"in the first step of each, {'; '.join(wrong)}. This is an error of the benchmark")


def prove_runs(exact: RunConfig, baseline: RunConfig) -> dict[str, Any]:
    """`prove_arms` for the training data that two configurations build in one process, without a model or process group."""
    return prove_arms(_arm_of(exact), _arm_of(baseline), exact.model.global_batch_size)


def _arm_of(run: RunConfig) -> Arm:
    from ..loss import ExactLoss, gpt_loss
    from ..training.data import build_datasets
    from ..training.data_files import read_vocabulary

    loss = ExactLoss(run.model.exact)
    loss_func = loss.wrap(gpt_loss) if run.model.exact.enabled else gpt_loss
    (train, _, _), _ = build_datasets(run, read_vocabulary(run, scan=True), loss)
    return Arm(train, loss_func)


def main(argv: list[str] | None = None) -> int:
    from ..training.config import load_config

    parser = argparse.ArgumentParser(prog="python -m exact_megatron.benchmark.arms", description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, help="JSON with the digests")
    parser.add_argument("--config", action="append", metavar="FILE", help="YAML; a later one wins key by key")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    try:
        exact, baseline = (
            load_config(args.config, [*args.overrides, f"model.exact.enabled={on}"]) for on in ("true", "false")
        )
        proof = prove_runs(exact, baseline)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.output, json.dumps(proof, indent=1) + "\n")
    except (ValueError, OSError, ExactError) as error:
        print(f"arms: {error}", file=sys.stderr)
        return 2
    print("arms: " + ", ".join(f"{name} {value}" for name, value in proof.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
