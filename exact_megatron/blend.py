"""How many samples the members of a blend hold, from their indices alone. numpy only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np


def whole_samples(tokens: int, seq_length: int, extra_token: int = 1, partial: bool = False) -> int:
    """Samples that GPTDataset packs from `tokens` tokens; with `partial` also the last, padded one (validation)."""
    return max(0, -(-(tokens - extra_token) // seq_length) if partial else (tokens - extra_token) // seq_length)


def split_tokens(lengths: np.ndarray, split: tuple[float, float]) -> int:
    """Tokens of the documents from share split[0] to share split[1], as BlendedMegatronDatasetBuilder rounds them."""
    first, last = (int(round(share * float(len(lengths)))) for share in split)
    return int(lengths[first:last].sum(dtype=np.int64))


def stored_order(lengths: np.ndarray, seq_length: int) -> np.ndarray | None:
    """int64[n], documents in stored order, repeated until they fill a sample as a member with a weight is; None: once is enough."""
    tokens = int(lengths.sum(dtype=np.int64))
    if tokens > seq_length or not tokens:
        return None
    return np.tile(np.arange(len(lengths)), -(-(seq_length + 1) // tokens))


def member_samples(
    prefixes: Sequence[str],
    tokens: Sequence[int],
    samples: int,
    seq_length: int,
    *,
    split: str = "train",
    extra_token: int = 1,
    partial: bool = False,
) -> tuple[int, list[int]]:
    """Epochs of an unweighted blend that hold `samples` samples, the same number for every member, and each member's samples.

    megatron.core packs one epoch of an unweighted blend and ends there. With these numbers of samples it repeats like a single
    data set: members are drawn by their size.

    Args:
        tokens: of each member in this split.
        split: its name, for the message.

    Raises:
        ValueError: names a member without a sample.
    """

    def count(epochs: int) -> list[int]:
        return [whole_samples(epochs * t, seq_length, extra_token, partial) for t in tokens]

    epochs = 1
    if sum(count(1)) < samples and sum(tokens) > 0:
        enough = (samples + len(tokens)) * (seq_length + 1) // sum(tokens) + 1
        epochs = 1 + bisect_left(range(1, enough + 1), samples, key=lambda e: sum(count(e)))
    sizes = count(epochs)
    for prefix, own, size in zip(prefixes, tokens, sizes):
        if size < 1:
            raise ValueError(
                f"{prefix} has no sample in the {split} split of an unweighted blend: {own} tokens, a sample of "
                f"model.data.seq_length={seq_length} needs {seq_length + extra_token}. Leave it out, join it with other data, or give "
                "the members weights, by which a short one is repeated"
            )
    return epochs, sizes
