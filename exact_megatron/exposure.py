"""Effective context of every target, and its exact histogram over a training stream. numpy only, no token is read."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .packing import aligned, segment_histogram, stream_tokens
from .utils.files import writing


def effective_context(cu_seqlens: np.ndarray, continues: bool = False) -> np.ndarray:
    """Effective context l_i = i - s(i) of the target at each input position (arXiv 2605.10544, section 3).

    Args:
        cu_seqlens: int[segments + 1], increasing boundaries [0, ..., S] of the visible segments in one sample.
        continues: the sample's last target belongs to the last segment (its document goes on in the next sample).

    Returns:
        int64[S], in tokens. Entry t belongs to the target at input position t: 1..L-1 inside a segment of length L and 0 at
        its last position, whose target is the next document's first token. With `continues` the last entry is the last
        segment's L.

    Raises:
        ValueError: boundaries that do not start at 0 or do not increase.
    """
    cu = np.asarray(cu_seqlens, dtype=np.int64)
    sizes = np.diff(cu)
    if cu.ndim != 1 or len(cu) < 2 or cu[0] != 0 or (sizes <= 0).any():
        raise ValueError(f"cu_seqlens must be increasing boundaries that start at 0, not {cu.tolist()[:8]}")
    context = np.arange(1, cu[-1] + 1)
    context -= np.repeat(cu[:-1], sizes)
    context[cu[1:] - 1] = 0
    if continues:
        context[-1] = sizes[-1]
    return context


class ExposureCensus:
    """How many supervised targets of a packed training stream have which effective context.

    Attributes:
        counts: int64[S + 1], supervised targets by effective context l = 0..S.
        seq_length: the window S in tokens.
        samples: packed samples counted.
    """

    def __init__(self, counts: np.ndarray, seq_length: int, samples: int) -> None:
        counts = np.asarray(counts, dtype=np.int64)
        if counts.shape != (seq_length + 1,) or (counts < 0).any():
            raise ValueError(
                f"counts must be {seq_length + 1} numbers >= 0 for a window of {seq_length}, not {counts.shape}"
            )
        self.counts = counts
        self.seq_length = int(seq_length)
        self.samples = int(samples)

    @property
    def targets(self) -> int:
        """Supervised targets."""
        return int(self.counts.sum())

    @property
    def tokens(self) -> int:
        """Input tokens, supervised or not."""
        return self.samples * self.seq_length

    @property
    def digest(self) -> str:
        """16 hex digits that change with the counts, the window and the number of samples."""
        return hashlib.sha256(f"{self.seq_length} {self.samples} ".encode() + self.counts.tobytes()).hexdigest()[:16]

    @classmethod
    def from_document_lengths(
        cls,
        lengths: np.ndarray,
        seq_length: int,
        *,
        document_index: np.ndarray | None = None,
        add_extra_token: bool = True,
        eod_mask_loss: bool = False,
        chosen: np.ndarray | None = None,
    ) -> ExposureCensus:
        """Census of the samples that Megatron packs from these documents, equal to counting over tokens.

        Args:
            lengths: int[documents], tokens per document, EOD included. A document is a sequence of the .idx, as in
                Megatron's own packing.
            seq_length: input tokens per sample S.
            document_index: int[n], order (and repetition) of documents as packed; None is the stored order, once.
            add_extra_token: samples hold one more token for the last label: (total - 1) // S of them. Without it the last
                target of a sample is a pad, which Megatron does not supervise.
            eod_mask_loss: targets whose input is the document's EOD are not supervised (they are those with l = 0, when
                every document ends with its only EOD).
            chosen: bool[samples], in packed order: count these samples only.

        Raises:
            ValueError: the documents do not fill one sample.
        """
        lengths = np.asarray(lengths)
        if document_index is not None:
            lengths = aligned(lengths)
        total = stream_tokens(lengths, document_index)
        samples = (total - int(add_extra_token)) // seq_length
        if samples < 1:
            raise ValueError(
                f"{total} tokens do not fill one sample of {seq_length} tokens: use a shorter window or more text"
            )
        if chosen is not None and len(chosen) != samples:
            raise ValueError(f"chosen has {len(chosen)} entries, the stream has {samples} samples")
        return cls._count(lengths, seq_length, document_index, samples, add_extra_token, eod_mask_loss, chosen)

    @classmethod
    def _count(
        cls,
        lengths: np.ndarray,
        seq_length: int,
        document_index: np.ndarray | None,
        samples: int,
        add_extra_token: bool,
        eod_mask_loss: bool,
        chosen: np.ndarray | None,
    ) -> ExposureCensus:
        segments = segment_histogram(lengths, seq_length, document_index=document_index, samples=samples, chosen=chosen)
        both = segments.ended + segments.continued
        counts = np.zeros(seq_length + 1, np.int64)
        counts[1:-1] = both[:0:-1].cumsum()[::-1][1:]  # a segment of length L has one target at each of 1..L-1
        if add_extra_token:
            counts += segments.continued
        if not eod_mask_loss:
            counts[0] = segments.ended.sum() - (0 if add_extra_token else segments.closing)
        return cls(counts, seq_length, samples if chosen is None else int(chosen.sum()))

    @classmethod
    def from_dataset(cls, dataset: Any, chosen: np.ndarray | None = None) -> ExposureCensus:
        """Census of all whole samples of a (built) GPTDataset; `chosen` is bool[samples] in packed order, before the shuffle."""
        if dataset.document_index is None:  # defer_npy_index_mmap: loaded at the first query
            dataset._query_document_sample_shuffle_indices(0)
        lengths = aligned(dataset.dataset.sequence_lengths)
        order = dataset.document_index
        seq_length = dataset.config.sequence_length
        extra = bool(dataset.config.add_extra_token_to_sequence)
        samples = (stream_tokens(lengths, order) - int(extra)) // seq_length
        return cls._count(lengths, seq_length, order, samples, extra, bool(dataset.config.eod_mask_loss), chosen)

    @classmethod
    def from_blend(cls, blend: Any) -> ExposureCensus:
        """Census of a (built) BlendedDataset: each member by the samples that the blend really draws from it."""
        if blend.dataset_index is None:  # defer_npy_index_mmap
            blend[0]
        parts = []
        for member, dataset in enumerate(blend.datasets):
            if dataset.shuffle_index is None:
                dataset._query_document_sample_shuffle_indices(0)
            drawn = blend.dataset_sample_index[blend.dataset_index == member]
            chosen = np.zeros(len(dataset.shuffle_index), bool)
            chosen[dataset.shuffle_index[drawn]] = True
            if len(drawn):
                parts.append(cls.from_dataset(dataset, chosen))
        return sum(parts[1:], parts[0])

    @classmethod
    def from_batches(cls, batches: Iterable[Mapping[str, Any]], seq_length: int) -> ExposureCensus:
        """Census of a stream that only a training loop can see: of these batches' supervised labels.

        Weights are right as far as the batches stand for the stream. Censuses add up: `census + ExposureCensus.from_batches(more, S)`.

        Args:
            batches: mappings with the arguments of `batch_context.effective_contexts`: labels, position_ids or ..., torch tensors.
            seq_length: the window S in tokens; a larger context counts as S.

        Raises:
            ValueError: no batch with a supervised label, or see `batch_context.effective_contexts`.
        """
        from .batch_context import effective_contexts

        counts = np.zeros(seq_length + 1, np.int64)
        tokens = 0
        for batch in batches:
            context = effective_contexts(**batch)
            supervised = context[context >= 0].clamp(max=seq_length)
            counts += supervised.bincount(minlength=seq_length + 1).cpu().numpy()
            tokens += context.numel()
        if not counts.any():
            raise ValueError(f"no label in {tokens} tokens of the batches is supervised: there is nothing to count")
        return cls(counts, seq_length, tokens // seq_length)

    def bucket_counts(self) -> np.ndarray:
        """int64[B], supervised targets per log2 bucket."""
        return bucket_sums(self.counts, self.seq_length)

    def share_below(self, context: int) -> float:
        """Share of the supervised targets with an effective context below `context` tokens."""
        return float(self.counts[: max(int(context), 0)].sum() / self.counts.sum())

    def __add__(self, other: ExposureCensus) -> ExposureCensus:
        if self.seq_length != other.seq_length:
            raise ValueError(f"a census at a window of {self.seq_length} cannot be added to one at {other.seq_length}")
        return ExposureCensus(self.counts + other.counts, self.seq_length, self.samples + other.samples)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, atomically."""
        where = Path(path)
        where.parent.mkdir(parents=True, exist_ok=True)
        facts = {"seq_length": self.seq_length, "samples": self.samples, "digest": self.digest}
        text = json.dumps({**facts, "counts": self.counts.tolist()})
        handle, temporary = tempfile.mkstemp(dir=where.parent, prefix=where.name)
        try:
            with writing(where), os.fdopen(handle, "w") as stream:
                stream.write(text)
        except OSError:
            os.unlink(temporary)
            raise
        os.chmod(temporary, 0o644)
        os.replace(temporary, where)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExposureCensus:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no census, or damaged.
        """
        try:
            data = json.loads(Path(path).read_text())
            census = cls(np.array(data["counts"], np.int64), data["seq_length"], data["samples"])
            if data.get("digest", census.digest) != census.digest:  # older files have none
                raise ValueError("its counts do not have its digest")
        except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
            raise ValueError(
                f"{path} is not a census as exact_megatron wrote it ({error}): remove it, and it is counted again"
            ) from error
        return census


def log2_bucket_edges(seq_length: int) -> np.ndarray:
    """Lower edges of the log2 buckets, then seq_length + 1: int64[B + 1] = [0, 8, 16, ..., 2^k, S + 1] with 2^k < S.

    The last bucket [2^k, S] is closed at the window: a document that fills a sample has one target with l = S, and a
    bucket of its own would give that rare target an absurd weight.
    """
    edges = [0]
    edge = 8
    while edge < seq_length:
        edges.append(edge)
        edge *= 2
    return np.array([*edges, seq_length + 1], np.int64)


def bucket_sums(values: np.ndarray, seq_length: int) -> np.ndarray:
    """Sum values[S + 1], given by effective context, over the log2 buckets."""
    return np.add.reduceat(values, log2_bucket_edges(seq_length)[:-1])
