"""Document boundaries of a micro-batch, and what follows from them for a rank's chunks."""

from __future__ import annotations

import functools
import operator
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

Lengths = tuple[int, ...]


@dataclass
class DocumentBoundaries(PackedSeqParams):
    """Made by `document_boundaries`; with the boundaries as Python ints, no forward waits for the device."""

    boundaries: Lengths = ()
    seq_length: int = 0


def document_boundaries(
    cu_seqlens: Iterable[int] | Tensor, seq_length: int, batch_size: int = 1, device: Any = None
) -> DocumentBoundaries:
    """Document boundaries of one micro-batch, as the `packed_seq_params` of a Megatron model.

    Args:
        cu_seqlens: [0, ..., b*S], increasing, over the flattened micro-batch (sample k is k*S .. (k+1)*S),
            with every k*S; the same on all TP and CP ranks. List, array or tensor of integers (CUDA: a sync).
        seq_length: S, the length of a sample before context parallelism cuts it.
        batch_size: b, samples in the micro-batch.
        device: of cu_seqlens_q and cu_seqlens_kv (int32), None is the CPU; this module uses the host copy.

    Returns:
        DocumentBoundaries with qkv_format "sbhd" and max_seqlen S (Megatron's length of RoPE).

    Raises:
        ValueError: no integers, no 0 at the start, no strict increase, no b*S at the end, or a k*S left out.
    """
    values = cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else list(cu_seqlens)
    try:
        cuts = tuple(operator.index(c) for c in values)
    except TypeError:
        raise ValueError(f"cu_seqlens must be a flat sequence of integers, got {values!r:.200}") from None
    total = batch_size * seq_length
    falls = [i for i, (a, b) in enumerate(pairwise(cuts)) if a >= b]
    missing = sorted(set(range(0, total, seq_length)).difference(cuts))
    if cuts[:1] != (0,):
        problem = f"starts with {cuts[:1]}, not 0: prepend the start of the first document"
    elif falls:
        at = slice(falls[0], falls[0] + 2)
        problem = f"does not increase at {at.start}: {cuts[at]}; leave out empty documents and padding"
    elif cuts[-1] != total:
        problem = f"ends at {cuts[-1]}, not at batch_size {batch_size} * seq_length {seq_length} = {total}: "
        problem += "pass the boundaries of the whole micro-batch, before context parallelism cuts it"
    elif missing:
        problem = f"lacks {missing[0]}, the start of a sample of length {seq_length}: insert it"
    else:
        cu = torch.tensor(cuts, dtype=torch.int32)
        cu = cu if device is None else cu.to(device, non_blocking=True)
        sizes = {"max_seqlen_q": seq_length, "max_seqlen_kv": seq_length, "seq_length": seq_length}
        return DocumentBoundaries("sbhd", cu, cu, boundaries=cuts, **sizes)
    raise ValueError(f"cu_seqlens {problem}")


# What follows from the boundaries is remembered by their value: all layers of a micro-batch share it.


@functools.lru_cache(maxsize=16)
def whole_samples(seq_length: int, batch: int) -> DocumentBoundaries:
    return document_boundaries(range(0, (batch + 1) * seq_length, seq_length), seq_length, batch)


@functools.lru_cache(maxsize=64)
def chunk_plan(cuts: Lengths, seq_length: int, rank: int, cp: int) -> list[tuple[slice, Lengths, Lengths]]:
    """Per sample and chunk of a rank: its keys in the flattened batch, the lengths of queries and of keys.

    Queries start with the chunk, keys with the document that is open there; they end together.
    """
    size = seq_length // (2 * cp)
    plan = []
    for sample in range(0, cuts[-1], seq_length):
        for low in (sample + rank * size, sample + (2 * cp - 1 - rank) * size):
            first, high = bisect_right(cuts, low) - 1, low + size
            ends = [min(c, high) for c in cuts[first + 1 : bisect_right(cuts, high - 1) + 1]]
            queries, keys = (tuple(b - a for a, b in pairwise([a0, *ends])) for a0 in (low, cuts[first]))
            plan.append((slice(cuts[first], high), queries, keys))
    return plan
