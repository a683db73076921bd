"""The plain references that the fast paths are compared to, and what they need."""

from __future__ import annotations

import numpy as np


def uneven_lengths(rng: np.random.Generator, seq_length: int, documents: int) -> np.ndarray:
    """Document lengths with the cases that break packing code: 1, 2, S - 1, S, S + 1, 10 S among ordinary ones."""
    special = [1, 2, seq_length - 1, seq_length, seq_length + 1, 10 * seq_length]
    ordinary = rng.integers(1, 2 * seq_length, max(documents - len(special), 0)).tolist()
    lengths = np.array([max(1, n) for n in special + ordinary], np.int32)
    rng.shuffle(lengths)
    return lengths


def context_of_targets(lengths: np.ndarray, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Effective context of each target, counted backwards over token ids that are positions in the stored corpus."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    document = np.repeat(np.arange(len(lengths)), lengths)
    context = np.zeros(len(tokens), np.int64)
    for t, label in enumerate(labels):
        back = 0
        while back <= t and tokens[t - back] == label - 1 - back and document[tokens[t - back]] == document[label]:
            back += 1
        # The document's first token has nothing before it, whatever stands there.
        context[t] = 0 if label == starts[document[label]] else back
    return context


class PositionTokenizer:
    """Tokens are positions in the corpus; no id is special."""

    vocab_size = 1 << 30
    eod = -5
    pad = -1
    unique_identifiers = {"class": "PositionTokenizer"}
    special_tokens_dict = {"eod": -5}
