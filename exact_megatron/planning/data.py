"""The planned run's training data, from their .idx files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..blend import stored_order
from ..exposure import ExposureCensus
from ..packing import read_index, segment_histogram

if TYPE_CHECKING:
    from ..training.schema import RunConfig


@dataclass(frozen=True)
class Data:
    """facts: a row a source; pairs: mean number of keys that a query sees; census: of the planned samples, by share."""

    facts: list[dict[str, Any]]
    pairs: float
    census: ExposureCensus


def read_data(run: RunConfig) -> tuple[Data | None, list[str]]:
    """Training data from their .idx files; (None, the prefixes without one) where some are not there yet.

    Documents are taken in stored order, all of them: the run itself shuffles, repeats and cuts off the validation split.
    """
    from ..training.data_files import data_prefixes
    from ..training.lengths import check_lengths

    data = run.model.data
    blends = data_prefixes(run)
    blend = blends.get("all") or blends["train"]
    assert blend is not None
    prefixes, weights = blend
    missing = [prefix for prefix in prefixes if not os.path.isfile(prefix + ".idx")]
    if missing:
        return None, missing
    held_out = blends.get("validation")
    if held_out is None or all(os.path.isfile(prefix + ".idx") for prefix in held_out[0]):
        check_lengths(run)
    used = 1.0
    if "all" in blends:
        parts = [float(part) for part in data.splits_string.replace("/", ",").split(",")]
        used = parts[0] / sum(parts)
    lengths = [read_index(prefix, run.whole_documents).lengths for prefix in prefixes]
    tokens = np.array([int(part.sum(dtype=np.int64)) for part in lengths])
    share = tokens / tokens.sum() if weights is None else np.array(weights) / sum(weights)
    samples = run.trainer.max_steps * run.model.global_batch_size
    s = data.seq_length
    facts = []
    pairs = 0.0
    counts = np.zeros(s + 1)
    for prefix, part, total, weight in zip(prefixes, lengths, tokens, share):
        order = stored_order(part, s)
        census = ExposureCensus.from_document_lengths(part, s, document_index=order, eod_mask_loss=data.eod_mask_loss)
        counts += census.counts * (weight * samples / census.samples)
        segments = segment_histogram(part, s, document_index=order, samples=census.samples)
        size = np.arange(s + 1, dtype=np.float64)
        pairs += weight * float((segments.ended + segments.continued) @ (size * (size + 1) / 2)) / census.tokens
        facts.append(
            {
                "prefix": prefix,
                "share": float(weight),
                "documents": len(part),
                "tokens": int(total * used),
                "epochs": float(weight * samples * s / (total * used)),
            }
        )
    if not data.document_masking:
        pairs = (s + 1) / 2
    return Data(facts, pairs, ExposureCensus(np.rint(counts), s, samples)), []
