"""Loss by effective context on held-out documents.

Each document is scored on its own, from its first token on; one longer than the window is cut into windows that do not
overlap, each of which starts with no context, as a sample of the packed stream does. Window k holds the inputs kS .. kS + S - 1 and
one token more for the last label, so that its target i has effective context i, 1 to S, in the log2 buckets of the project
(a window's S belongs to the last one). A document's first token is not a target, and a window's first token is the
last target of the window before it: every other token of a document is scored once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..exposure import log2_bucket_edges
from ..packing import TokenIndex, read_index
from .scorer import Scorer
from .store import Metric, Store, digest

METRIC = Metric(
    "Loss by effective context",
    "loss (nats per token)",
    higher_is_better=False,
    pooled=True,
    length="effective context",
    inclusive=False,
)


class Documents:
    """A seeded choice of the documents of a .bin/.idx pair.

    Args:
        prefix: of the pair.
        count: how many documents, at most.
        least: tokens a document must have, at least 2.
        seed: of the choice; a larger `count` keeps the documents of a smaller one.

    Raises:
        ValueError: no document is that long.
    """

    def __init__(self, prefix: str, count: int, least: int, seed: int) -> None:
        self.index: TokenIndex = read_index(prefix)
        self.tokens = np.memmap(self.index.prefix + ".bin", dtype=self.index.dtype, mode="r")
        self.starts = np.cumsum(self.index.lengths, dtype=np.int64) - self.index.lengths
        fitting = np.flatnonzero(self.index.lengths >= max(least, 2))
        if not len(fitting):
            raise ValueError(f"{prefix} has no document of {max(least, 2)} tokens or more: lower --min-tokens")
        self.chosen = np.random.default_rng(seed).permutation(fitting)[:count].tolist()
        self.fitting = len(fitting)
        self.digest = digest(np.asarray(self.index.lengths), *(self.read(n) for n in self.chosen[:64]))

    def read(self, number: int) -> np.ndarray:
        """int64[length] of a document."""
        start = self.starts[number]
        return self.tokens[start : start + self.index.lengths[number]].astype(np.int64)


def document_losses(scorer: Scorer, ids: np.ndarray, window: int) -> np.ndarray:
    """Losses of a document's tokens but the first, float64[length - 1]; target t has context t % window + 1."""
    parts = []
    for start in range(0, len(ids) - 1, window):
        part = ids[start : start + window + 1].tolist()
        parts.append(-scorer.logprobs(part[:-1], range(len(part) - 1), part[1:]))
    return np.concatenate(parts)


def measure(scorer: Scorer, name: str, ids: np.ndarray, window: int) -> dict[str, Any]:
    """The record of a document: its loss and targets in every bucket, as cells ("loss", lower edge)."""
    if int(ids.max()) >= scorer.vocab_size:
        raise ValueError(
            f"document {name} holds token id {int(ids.max())}, the model has 0..{scorer.vocab_size - 1}: other tokenizer"
        )
    losses = document_losses(scorer, ids, window)
    context = np.arange(len(losses)) % window + 1
    edges = log2_bucket_edges(window)
    bucket = np.searchsorted(edges, context, side="right") - 1
    cells = []
    for b in np.unique(bucket):
        inside = losses[bucket == b]
        cells.append(["loss", int(edges[b]), float(inside.sum()), len(inside)])
    return {"id": name, "hash": digest(ids, window), "unit": name, "tokens": len(ids), "cells": cells}


def run(scorer: Scorer, documents: Documents, store: Store, window: int) -> None:
    """Score the chosen documents, but for what `store` holds already."""
    from tqdm import tqdm

    for number in tqdm(documents.chosen, desc="context-loss", unit="document"):
        if str(number) not in store.records:
            store.add(measure(scorer, str(number), documents.read(number), window))
