"""From a census to a weight for every effective context (arXiv 2605.10544, section 4). numpy only."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import ExactConfig
from .exposure import ExposureCensus, bucket_sums, log2_bucket_edges

if TYPE_CHECKING:
    from torch import Tensor

WIDEST = 2.0**24  # largest over smallest weight; beyond, adding the two in float32 loses the smaller
MEAN_TOLERANCE = 1e-4  # of the corpus mean; float32 keeps it to about 1e-7 while no weight is many times another


class NoTail(ValueError):
    """No target lies in the tail, so that there is nothing to weight."""


class WeightTable:
    """Weight of a target by its effective context.

    With q_b = c_b / sum_T c over the tail T (buckets with lower edge >= tau) and r_b = (q_b + eps)^-gamma:
    w_b = 1 + alpha r_b / sum_T(q r) in the tail and 1 elsewhere, so that sum_T q_b (w_b - 1) = alpha.

    Attributes:
        config: the settings with tau and alpha resolved; tail_share has become the alpha that it means.
        seq_length: window S in tokens.
        edges: int64[B + 1], lower edges of the buckets, then S + 1.
        bucket_weights: float64[B], w_b before normalization.
        lookup: float32[S + 1], the weight given to a target with effective context l.
        bucket_markers: float32[T], the tail's weights in `lookup`, one per tail bucket in order of context. Pairwise distinct and
            distinct from the short part's, so that a target's bucket can be told from its weight; empty with alpha = 0,
            where every weight is exactly 1.
        mean: corpus mean of `lookup`.
        digest: 16 hex digits that change with the window, any weight, and who gets it (placebo).
    """

    def __init__(self, counts: np.ndarray, seq_length: int, config: ExactConfig, weighted: bool = True) -> None:
        config = config.validated(seq_length)
        tau = config.tau
        assert tau is not None
        self.config = config
        self.seq_length = seq_length
        self.counts = np.asarray(counts, np.int64)
        self.edges = log2_bucket_edges(seq_length)
        self.tail = np.flatnonzero(self.edges[:-1] >= tau)
        bucket_counts = bucket_sums(self.counts, seq_length)
        self.bucket_weights = np.ones(len(bucket_counts))
        if weighted:
            config = self.config = _resolve_alpha(bucket_counts, self.tail, config)
            self.bucket_weights = _bucket_weights(bucket_counts, self.tail, config, self.counts)

        self._lookups: dict[Any, Tensor] = {}  # by device

        scale = 1.0
        if config.normalization == "corpus":
            scale = float(bucket_counts @ self.bucket_weights / bucket_counts.sum())
        with np.errstate(over="ignore"):  # refused below
            applied = (self.bucket_weights / scale).astype(np.float32)
        self.bucket_markers = np.empty(0, np.float32)
        if (self.bucket_weights != 1).any() and np.isfinite(applied).all():
            applied = _distinct(self.bucket_weights / scale, self.tail, bucket_counts, config.normalization == "corpus")
            self.bucket_markers = applied[self.tail]
        self.lookup = np.repeat(applied, np.diff(self.edges))
        with np.errstate(invalid="ignore"):
            self.mean = float(self.counts @ self.lookup.astype(np.float64) / self.counts.sum())
        self._refuse_broken_weights(applied)
        kind = "placebo " if config.placebo else ""
        self.digest = hashlib.sha256(f"{kind}{seq_length} ".encode() + self.lookup.tobytes()).hexdigest()[:16]

    def _refuse_broken_weights(self, applied: np.ndarray) -> None:
        config = self.config
        short = f"{applied[0]:g} below tau={config.tau}, " if self.tail[0] else ""
        found = f"{short}up to {applied[self.tail].max():g} from there on, and their mean is {self.mean:.9g}"
        given = f"model.exact.alpha={config.alpha:g} with model.exact.gamma={config.gamma:g} gives the weights {found}"
        remedy = "choose a smaller model.exact.alpha (paper: 0.15), or cap the weights with model.exact.max_weight"
        if not (np.isfinite(applied).all() and applied.min() > 0 and applied.max() <= WIDEST * applied.min()):
            raise ValueError(f"{given}: in a float32 sum the largest leaves nothing of the smallest; {remedy}")
        if config.normalization == "corpus" and abs(self.mean - 1) > MEAN_TOLERANCE:
            raise ValueError(
                f"{given}, more than {MEAN_TOLERANCE:g} from the 1 that keeps loss and learning rate the baseline's; {remedy}"
            )

    @classmethod
    def from_census(cls, census: ExposureCensus, config: ExactConfig) -> WeightTable:
        """Weights for the stream that was counted.

        Raises:
            NoTail: no target lies in the tail. ValueError: float32 does not hold the weights.
        """
        return cls(census.counts, census.seq_length, config)

    @classmethod
    def unweighted(cls, census: ExposureCensus, config: ExactConfig) -> WeightTable:
        """Every weight 1, to show a stream that cannot be weighted."""
        return cls(census.counts, census.seq_length, config, weighted=False)

    @classmethod
    def from_counts(
        cls,
        counts: np.ndarray,
        seq_length: int,
        *,
        alpha: float = ExactConfig.alpha,
        tail_share: float | None = ExactConfig.tail_share,
        gamma: float = ExactConfig.gamma,
        tau: int | None = ExactConfig.tau,
        eps: float = ExactConfig.eps,
        normalization: str = ExactConfig.normalization,
        max_weight: float | None = ExactConfig.max_weight,
    ) -> WeightTable:
        """Weights from int64[S + 1] targets by effective context."""
        config = ExactConfig(
            alpha=alpha,
            tail_share=tail_share,
            gamma=gamma,
            tau=tau,
            eps=eps,
            normalization=normalization,
            max_weight=max_weight,
        )
        return cls(ExposureCensus(counts, seq_length, 0).counts, seq_length, config)

    @classmethod
    def measuring(cls, seq_length: int) -> WeightTable:
        """Weights that differ by a rounding step from bucket to bucket: they mark every bucket for a report of unweighted
        losses by effective context, and are never trained with."""
        return cls.from_counts(
            np.ones(seq_length + 1, np.int64), seq_length, alpha=1.0, gamma=0.0, tau=0, normalization="none"
        )

    def weights(self, labels: Tensor, **documents: Any) -> Tensor:
        """Weight of every label of a batch, for a training loop of one's own: sum(weights * losses) / supervised labels.

        Args:
            labels: int [S] or [b, S], on any device.
            documents: position_ids, cu_seqlens or document_ids, and the other arguments of `batch_context.effective_contexts`.

        Returns:
            float32 like labels; 0 where a label is not supervised. A context above the window has the weight of the window.

        Raises:
            ValueError: see `batch_context.effective_contexts`.
        """
        import torch

        from .batch_context import UNSUPERVISED, effective_contexts

        context = effective_contexts(labels, **documents)
        lookup = self._lookups.get(labels.device)
        if lookup is None:
            lookup = self._lookups[labels.device] = torch.from_numpy(self.lookup).to(labels.device)
        return lookup[context.clamp(0, self.seq_length)] * (context != UNSUPERVISED)

    @property
    def part_names(self) -> list[str]:
        """Names of the parts of the context range that weights tell apart: the short part, if there is one, then a name for
        each of `bucket_markers`: ["0-1023", "1024-2047", "2048-4096"]. Empty with alpha = 0."""
        if not len(self.bucket_markers):
            return []
        short = [f"0-{self.edges[self.tail[0]] - 1}"] if self.tail[0] else []
        return short + [f"{self.edges[b]}-{self.edges[b + 1] - 1}" for b in self.tail]

    def rows(self) -> list[dict[str, Any]]:
        """One row a bucket: low, high (inclusive), targets, share, weight (as applied), weighted_share."""
        counts = bucket_sums(self.counts, self.seq_length)
        weight = self.lookup[self.edges[:-1]].astype(np.float64)
        mass = counts * weight
        return [
            {
                "low": int(self.edges[b]),
                "high": int(self.edges[b + 1] - 1),
                "targets": int(counts[b]),
                "share": float(counts[b] / counts.sum()),
                "weight": float(weight[b]),
                "weighted_share": float(mass[b] / mass.sum()),
            }
            for b in range(len(counts))
        ]

    @property
    def tail_share(self) -> float:
        """Share of the supervised targets that lie in the tail."""
        return sum(row["share"] for row in self.rows() if row["low"] >= self.edges[self.tail[0]])

    @property
    def weighted_tail_share(self) -> float:
        """Share of the loss weight that lies in the tail."""
        return sum(row["weighted_share"] for row in self.rows() if row["low"] >= self.edges[self.tail[0]])


def _resolve_alpha(bucket_counts: np.ndarray, tail: np.ndarray, config: ExactConfig) -> ExactConfig:
    """The settings with the alpha that gives the tail its share of the loss weight.

    The tail's weight, sum_T c_b min(1 + alpha r_b / rbar, max_weight), grows with alpha, along a line between the values at which
    another bucket reaches max_weight.
    """
    share = config.tail_share
    in_tail = bucket_counts[tail].astype(np.float64)
    if share is None or not in_tail.any():  # without a tail _bucket_weights says so
        return config
    short = float(bucket_counts.sum() - in_tail.sum())
    wanted = share / (1 - share) * short - in_tail.sum()  # beyond what the targets have at weight 1
    if wanted < 0:
        natural = in_tail.sum() / bucket_counts.sum()
        raise ValueError(
            f"model.exact.tail_share={share:g} is below {natural:.4g}, the share of the targets that lie in the tail: choose a larger one"
        )
    growth = _relative_weights(in_tail, config)  # of a bucket's weight with alpha
    room = np.inf if config.max_weight is None else config.max_weight - 1
    if wanted > room * in_tail.sum():
        most = in_tail.sum() * (1 + room)
        raise ValueError(
            f"model.exact.tail_share={share:g} cannot be reached with model.exact.max_weight={config.max_weight:g}: all of the tail at "
            f"that weight has {most / (most + short):.4g} of the loss weight. Choose a smaller share, or a larger max_weight"
        )
    alpha = 0.0
    free = in_tail > 0  # filled buckets that max_weight does not cap
    for bucket in sorted(np.flatnonzero(free), key=lambda b: -growth[b]):
        at_cap = in_tail[~free].sum() * (room if np.isfinite(room) else 0.0)
        alpha = (wanted - at_cap) / (in_tail[free] @ growth[free])
        if alpha * growth[bucket] <= room:
            break
        free[bucket] = False
    return dataclasses.replace(config, alpha=float(alpha), tail_share=None)


def _bucket_weights(bucket_counts: np.ndarray, tail: np.ndarray, config: ExactConfig, counts: np.ndarray) -> np.ndarray:
    in_tail = bucket_counts[tail]
    if in_tail.sum() == 0:
        longest = int(np.flatnonzero(counts)[-1]) if counts.any() else 0
        edges = log2_bucket_edges(len(counts) - 1)[:-1]
        least = int(edges[edges <= longest][-1])
        raise NoTail(
            f"no target has an effective context of tau={config.tau} or more in a window of {len(counts) - 1} tokens: the longest "
            f"seen is {longest}. Set model.exact.tau to at most {least}, the last bucket with targets, or use longer documents"
        )
    weights = np.ones(len(bucket_counts))
    weights[tail] += config.alpha * _relative_weights(in_tail, config)
    return weights if config.max_weight is None else np.minimum(weights, config.max_weight)


def _relative_weights(in_tail: np.ndarray, config: ExactConfig) -> np.ndarray:
    """r_b / rbar of the tail's buckets, float64, from their targets: what alpha is multiplied by."""
    q = in_tail / in_tail.sum()
    filled = np.flatnonzero(in_tail)
    r = np.zeros(len(in_tail))
    logarithm = -config.gamma * np.log(q[filled] + config.eps)
    r[filled] = np.exp(logarithm - logarithm.max())  # a common factor cancels
    for empty in np.flatnonzero(in_tail == 0):  # the nearest bucket that has targets; of two, the shorter context
        r[empty] = r[filled[np.argmin(np.abs(filled - empty))]]
    return r / (q @ r)


def _distinct(exact: np.ndarray, tail: np.ndarray, bucket_counts: np.ndarray, keep_mean: bool) -> np.ndarray:
    """Round weights float64[B] to float32 such that the tail's are pairwise distinct and above the short part's, and a rarer
    bucket's above a more frequent one's. With `keep_mean` the short part's weight takes up what rounding moves."""
    rounded = exact.astype(np.float32)
    below = rounded[0] if tail[0] else np.float32(0)
    taken = set()
    for bucket in sorted(tail, key=lambda b: (-bucket_counts[b], b)):
        if bucket_counts[bucket]:
            rounded[bucket] = below = max(rounded[bucket], np.nextafter(below, np.float32(np.inf)))
        while rounded[bucket] in taken or rounded[bucket] <= rounded[0] and tail[0]:
            rounded[bucket] = np.nextafter(rounded[bucket], np.float32(np.inf))
        taken.add(rounded[bucket])
    short = bucket_counts[: tail[0]].sum()
    if keep_mean and short:
        weight = np.float32((bucket_counts.sum() - bucket_counts[tail] @ rounded[tail].astype(np.float64)) / short)
        # A short part of a few targets cannot take up the rounding of millions: its weight stays, the mean is off by 1e-7.
        if abs(weight - rounded[0]) <= 1e-3 * rounded[0] and weight < rounded[tail].min():
            rounded[: tail[0]] = weight
    return rounded
