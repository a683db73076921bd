"""Synthetic documents with log-normal lengths."""

from __future__ import annotations

import json

import numpy as np

from ..utils.files import write_text
from .harness import SEED

MU = 6.0
SIGMA = 1.2
CLIP = (8, 131072)  # median 403 and mean about 830 tokens
VOCABULARY = 4096


def document_lengths(documents: int) -> np.ndarray:
    """int32[documents], tokens per document, EOD included."""
    drawn = np.random.default_rng(SEED).lognormal(MU, SIGMA, documents)
    return np.clip(drawn, *CLIP, out=drawn).astype(np.int32)


def write_corpus(
    prefix: str, tokens: int, vocabulary: int = VOCABULARY, lengths: np.ndarray | None = None
) -> np.ndarray:
    """Write at least `tokens` random tokens as .bin, .idx and .json, EOD (0) last; returns the documents' lengths.

    Args:
        lengths: tokens per document to take from the start, again and again; None draws `document_lengths`.
    """
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    if lengths is None:
        lengths = document_lengths(tokens // CLIP[0] + 1)
    lengths = np.tile(lengths, -(-tokens // int(lengths.sum(dtype=np.int64))))
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(dtype=np.int64), tokens)) + 1]
    rng = np.random.default_rng(SEED)
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(vocabulary))
    for n in lengths.tolist():
        builder.add_document(torch.from_numpy(np.append(rng.integers(1, vocabulary, n - 1), 0)), [n])
    builder.finalize(prefix + ".idx")
    write_text(prefix + ".json", json.dumps({"vocab_size": vocabulary, "eod_id": 0}))
    return lengths


def benchmark_corpus(documents: int, seq_length: int) -> str:
    law = f"log-normal, mu {MU:g}, sigma {SIGMA:g}, clipped to {CLIP[0]}..{CLIP[1]:,} tokens"
    return f"{documents:,} documents ({law}), window {seq_length:,}"
