"""Floating-point operations of a model, by its geometry and the documents' lengths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .data import Data
from .memory import attention_widths, matrix_parameters

if TYPE_CHECKING:
    from ..training.schema import ModelConfig, RunConfig


def step_flops(m: ModelConfig, vocabulary: int, tokens: float, pairs: float) -> tuple[float, float]:
    """Floating-point operations of forward and backward, of the matrices and the attention alone.

    Args:
        vocabulary: rows of the output layer.
        tokens: each takes 6 operations a weight of every matrix that is multiplied (the output layer, not the input embedding).
        pairs: query-key pairs that attend each other, a head (`causal_pairs`); each takes 12 operations a query channel: two
            products in forward, four in backward. Nothing for what is computed again, by recomputation or in a kernel.

    Returns:
        (all of them, those of the attention).
    """
    _, q, _ = attention_widths(m)
    matrices = m.num_layers * matrix_parameters(m) + m.hidden_size * vocabulary
    attention = 12.0 * m.num_layers * q * pairs
    return 6.0 * tokens * matrices + attention, attention


def flops_per_token(run: RunConfig, vocab_size: int, data: Data | None) -> dict[str, Any]:
    """`step_flops` of a token, whose query sees half of the window, or what the documents leave (sum of L (L + 1) / 2)."""
    m = run.model
    window = (m.data.seq_length + 1) / 2
    pairs = window if data is None else data.pairs
    total, attention = step_flops(m, run.padded_vocab_size(vocab_size), 1, pairs)
    return {
        "total": total,
        "attention": attention,
        "keys_seen": pairs,
        "counted": "full causal window" if pairs == window else "document by document",
    }


def causal_pairs(lengths: Iterable[int] | np.ndarray) -> int:
    """Query-key pairs of causal attention inside segments of these lengths: the sum of L (L + 1) / 2, about half their squares."""
    n = np.asarray(lengths, dtype=np.int64)
    return int((n * (n + 1) // 2).sum())
