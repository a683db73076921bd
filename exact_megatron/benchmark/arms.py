"""Proof that the two arms of a comparison differ in EXACT's weights and in nothing else, given before either is timed or trained.

Benchmarks prove the data and the loss function they are about to run. A paired training proves what its configurations build:

    python -m exact_megatron.benchmark.arms OUT.json [--config FILE ...] [key=value ...]

builds the data of the configuration twice, with model.exact.enabled=true and =false, and writes the digests, or ends with code 2.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import ExactError
from ..utils.files import write_text

if TYPE_CHECKING:
    from ..training.schema import RunConfig

BATCHES = 64  # a batch without a target in the tail proves nothing: so many are looked at


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
        plain: whether the loss mask is 0 or 1 everywhere.
        tail weights: number of different weights in the table's tail; 0 with alpha = 0, where all weights are 1.
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
    marks = np.empty(0, np.float32) if table is None else table.marks
    boundaries = [np.unique(sample["cu_seqlens"].numpy()) for sample in read if "cu_seqlens" in sample]
    return {
        "weight table": table and table.digest,
        "loss": None if hook is None else getattr(hook.table, "digest", "no table"),
        "tokens": digest(sample[key] for sample in read for key in ("tokens", "labels")),
        "loss mask": digest(masks),
        "plain": all(np.isin(mask, (0, 1)).all() for mask in masks),
        "tail weights": len(marks),
        "tail": int(sum(np.isin(mask, marks).sum() for mask in masks)),
        "segments": sum(len(b) - 1 for b in boundaries) if boundaries else None,
    }


def prove_arms(exact: Arm, baseline: Arm, batch: int, unmasked: Arm | None = None) -> dict[str, Any]:
    """Prove on the first batches that `exact` is weighted and `baseline` is not, on the same tokens.

    Args:
        batch: samples of a batch; the first batch that has a target in the tail is the proof, of at most BATCHES.
        unmasked: a third arm, as `baseline` but with every sample as one document.

    Returns:
        Digests for the result: {"samples", "tokens", "weight table", "tail targets", "loss mask of exact", "loss mask of baseline"}.

    Raises:
        ExactError: the arms do not differ as they must; says in what, and what to set.
    """
    count = min(BATCHES, len(exact.dataset) // batch)
    for first in range(0, count * batch, batch):
        samples = range(first, first + batch)
        own, other = fingerprint(exact, samples), fingerprint(baseline, samples)
        where = f"samples {first} to {first + batch - 1}"
        _refuse_unweighted(own)
        _refuse_weighted(other, "baseline", where)
        if own["tokens"] != other["tokens"]:
            raise _vacuous(f"the arms read different tokens in {where}: give both the same data, seed and batch sizes")
        if unmasked is not None:
            third = fingerprint(unmasked, samples)
            _refuse_weighted(third, "causal", where)
            if third["tokens"] != other["tokens"] or third["segments"] is not None or other["segments"] is None:
                raise _vacuous(f"the arm without document masks has other tokens or has boundaries in {where}")
        if not own["tail"]:
            continue
        if own["loss mask"] == other["loss mask"]:
            raise _vacuous(f"both arms have the loss mask {own['loss mask']} in {where}")
        return {
            "samples": f"{first} to {first + batch - 1}",
            "tokens": own["tokens"],
            "weight table": own["weight table"],
            "tail targets": own["tail"],
            "loss mask of exact": own["loss mask"],
            "loss mask of baseline": other["loss mask"],
        }
    raise _vacuous(
        f"no target of the first {count} batches of {batch} samples lies in the tail, so that nothing is up-weighted: lower "
        "model.exact.tau, take longer documents, or train longer than a batch"
    )


def _vacuous(problem: str) -> ExactError:
    return ExactError(f"EXACT and baseline cannot be compared: {problem}")


def _refuse_unweighted(found: dict[str, Any]) -> None:
    if found["weight table"] is None:
        raise _vacuous("the data of the arm exact have no weight table: set model.exact.enabled=true in this arm")
    if found["loss"] != found["weight table"]:
        raise _vacuous(
            f"the data of the arm exact are weighted by table {found['weight table']}, its loss reads {found['loss']}: train with what "
            "ExactLoss.wrap(loss_func) returns"
        )
    if not found["tail weights"]:
        raise _vacuous("all weights of the arm exact are 1: set model.exact.alpha above 0")


def _refuse_weighted(found: dict[str, Any], name: str, where: str) -> None:
    if found["weight table"] is not None:
        raise _vacuous(
            f"the data of the arm {name} have the weight table {found['weight table']}: set model.exact.enabled=false"
        )
    if found["loss"] is not None:
        raise _vacuous(f"the loss function of the arm {name} is hooked: it takes the plain one")
    if not found["plain"]:
        raise _vacuous(f"the loss mask of the arm {name} has other values than 0 and 1 in {where}")


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
