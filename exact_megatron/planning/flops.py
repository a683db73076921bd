"""Floating-point operations of a model, by its geometry and the documents' lengths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .data import Data
from .memory import attention_widths, linear_parameters

if TYPE_CHECKING:
    from ..training.schema import RunConfig


def flops_per_token(run: RunConfig, vocab_size: int, data: Data | None) -> dict[str, Any]:
    """Floating-point operations of the model, forward and backward, a token; nothing for recomputation.

    6 a weight of every matrix that is multiplied (the output layer, not the input embedding), and 12 a query channel for each
    key that a query sees: half of the window, or what the documents leave (sum of L (L + 1) / 2 over the pieces).
    """
    m = run.model
    _, q, _ = attention_widths(m)
    window = (m.data.seq_length + 1) / 2
    pairs = window if data is None else data.pairs
    matrices = m.num_layers * sum(linear_parameters(m)) + m.hidden_size * run.padded_vocab_size(vocab_size)
    return {
        "total": 6 * matrices + 12 * m.num_layers * q * pairs,
        "attention": 12 * m.num_layers * q * pairs,
        "keys_seen": pairs,
        "counted": "full causal window" if pairs == window else "document by document",
    }


def causal_pairs(lengths: Iterable[int] | np.ndarray) -> int:
    """Query-key pairs of causal attention inside pieces of these lengths: the sum of L (L + 1) / 2, about half their squares."""
    n = np.asarray(lengths, dtype=np.int64)
    return int((n * (n + 1) // 2).sum())
