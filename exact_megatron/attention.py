"""Core attention for packed documents: one path for every layout, exact under context parallelism.

`DocumentAttention` replaces `core_attention` in a Megatron layer spec. The boundaries are PackedSeqParams,
which Megatron hands to every layer, recomputed ones too; with qkv_format "sbhd" attention and RoPE take their
stock branch (positions run through the whole sample), and only this module reads the boundaries.

Under context parallelism the batch stays Megatron's whole-sequence zigzag: rank r has chunks r and 2*cp-1-r.
Transformer Engine's own thd attention expects a zigzag per document and is silently wrong on it. Exact are:

* ulysses: all-to-all over heads, attention over whole samples, all-to-all back (arXiv 2309.14509). Balanced;
  the KV heads of a tensor-parallel rank must divide by cp.
* gather: all-gather of K/V; a chunk's queries see their documents from the start (arXiv 2407.21783). Any
  number of heads. Only the local K/V are kept for backward, which gathers again.

The kernel inside is Transformer Engine's thd attention or torch's varlen_attn on CUDA in half precision, else
scaled_dot_product_attention document by document. The CUDA kernels cannot run on a CPU: there tests/te runs Transformer
Engine's own Python around a stand-in for its kernels, and the other tests stand in for the two calls.
"""

from __future__ import annotations

import functools
import inspect
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from .context_parallel import GatherSpans, LocalKV, ToHeads, ToSequence
from .supported import COMM_TYPES, check_supported

__all__ = ["DocumentAttention", "DocumentBoundaries", "check_supported", "document_boundaries"]

MODES = ("auto", "ulysses", "gather")
KERNELS = ("auto", "te", "varlen", "sdpa")
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
def _whole_samples(seq_length: int, batch: int) -> DocumentBoundaries:
    return document_boundaries(range(0, (batch + 1) * seq_length, seq_length), seq_length, batch)


@functools.lru_cache(maxsize=64)
def _chunk_plan(cuts: Lengths, seq_length: int, rank: int, cp: int) -> list[tuple[slice, Lengths, Lengths]]:
    """Per sample and chunk of a rank: its keys in the flattened batch, the lengths of queries and of keys.

    Queries start with the chunk, keys with the document that is open there; they end together.
    """
    size, plan = seq_length // (2 * cp), []
    for sample in range(0, cuts[-1], seq_length):
        for low in (sample + rank * size, sample + (2 * cp - 1 - rank) * size):
            first, high = bisect_right(cuts, low) - 1, low + size
            ends = [min(c, high) for c in cuts[first + 1 : bisect_right(cuts, high - 1) + 1]]
            queries, keys = (tuple(b - a for a, b in pairwise([a0, *ends])) for a0 in (low, cuts[first]))
            plan.append((slice(cuts[first], high), queries, keys))
    return plan


@functools.lru_cache(maxsize=256)
def _cu_seqlens(lengths: Lengths, device: torch.device) -> Tensor:
    # a blocking copy would wait for the whole stream
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


# Kernels: query [tq, heads, d], key and value [tk, kv_heads, d], lengths -> output [tq, heads, d] in pieces. Key and value
# that are parts of one buffer come as key [tk, 2, kv_heads, d] and value None: Transformer Engine detects layouts by storage
# offsets and rejects parts that do not start at 0, unless they are declared to be interleaved.


def _apart(k: Tensor, v: Tensor | None) -> tuple[Tensor, ...]:
    return k.unbind(1) if v is None else (k, v)


@functools.cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _sdpa(q: Tensor, k: Tensor, v: Tensor | None, nq: Lengths, nk: Lengths, scale: float | None) -> list[Tensor]:
    """Document by document, any device and dtype."""
    k, v = _apart(k, v)
    pieces, gqa = [], q.size(1) != k.size(1)
    # split, not slices: its backward is one concatenation, not a zero-filled tensor per document
    for part in zip(q.split(nq), k.split(nk), v.split(nk), strict=True):
        qi, ki, vi = (t.transpose(0, 1).unsqueeze(0) for t in part)
        rows, columns, mask = qi.size(2), ki.size(2), None
        if 1 < rows < columns:  # is_causal would put the triangle at the upper left
            mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        square = rows == columns
        out = F.scaled_dot_product_attention(qi, ki, vi, mask, 0.0, square, scale=scale, enable_gqa=gqa)
        pieces.append(out.squeeze(0).transpose(0, 1))
    return pieces


def _varlen(q: Tensor, k: Tensor, v: Tensor | None, nq: Lengths, nk: Lengths, scale: float | None) -> list[Tensor]:
    """torch's varlen_attn (CUDA, half precision); window (-1, 0) is causal, aligned at the lower right."""
    from torch.nn.attention.varlen import varlen_attn

    k, v = _apart(k, v)
    cu = [_cu_seqlens(n, q.device) for n in (nq, nk)]
    # torch 2.11 has no such argument and hands any number of KV heads to flash attention, whose kernels take them
    gqa = {"enable_gqa": q.size(1) != k.size(1)} if "enable_gqa" in _arguments(varlen_attn) else {}
    return [varlen_attn(q, k, v, *cu, max(nq), max(nk), scale=scale, window_size=(-1, 0), **gqa)]


@functools.cache
def _te_module(heads: int, kv_heads: int, channels: int, scale: float | None) -> Any:
    import transformer_engine.pytorch as te

    # knows no parallelism, only the heads that are there; outside the model, so not in checkpoints
    return te.DotProductAttention(heads, channels, num_gqa_groups=kv_heads, attention_dropout=0.0,
                                  qkv_format="thd", softmax_scale=scale)  # fmt: skip


def _te(q: Tensor, k: Tensor, v: Tensor | None, nq: Lengths, nk: Lengths, scale: float | None) -> list[Tensor]:
    """Transformer Engine (CUDA, half precision); the mask of gather needs cuDNN >= 9.7 or flash-attn."""
    module = _te_module(q.size(1), k.size(-2), q.size(2), scale)
    if v is None and "kv_layer" not in _arguments(type(module).forward):  # older versions: copies start at offset 0
        k, v = (t.clone(memory_format=torch.contiguous_format) for t in k.unbind(1))
    kv = {"key_layer": k, "value_layer": v}
    if v is None:
        kv = {"key_layer": None, "value_layer": None, "kv_layer": k}
    mask = "padding_causal" if nq == nk else "padding_causal_bottom_right"
    cu_q, cu_k = (_cu_seqlens(n, q.device) for n in (nq, nk))
    out = module(
        q, **kv, qkv_format="thd", cu_seqlens_q=cu_q, cu_seqlens_kv=cu_k, max_seqlen_q=max(nq),
        max_seqlen_kv=max(nk), attn_mask_type=mask)  # fmt: skip
    return [out.view(q.shape)]


_KERNELS: dict[str, Callable[..., list[Tensor]]] = {"te": _te, "varlen": _varlen, "sdpa": _sdpa}


@functools.cache
def _fastest_on_cuda() -> str:
    try:
        import transformer_engine.pytorch  # noqa: F401

        return "te"
    except (ImportError, OSError):
        pass
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "sdpa"
    return "varlen" if {"scale", "window_size"} <= _arguments(varlen_attn) else "sdpa"  # from torch 2.11 on


def kernel_name(asked: str, query: Tensor) -> str:
    """Which of "te", "varlen", "sdpa" takes this query, if "auto" or one of them was asked for."""
    half_on_cuda = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    return asked if asked != "auto" else _fastest_on_cuda() if half_on_cuda else "sdpa"


class DocumentAttention(MegatronModule):
    """Causal attention inside documents, in place of `core_attention` in a Megatron layer spec.

    Takes the arguments of DotProductAttention and TEDotProductAttention, and two more, set by the params
    of a ModuleSpec, by `with_mode`, or as class attributes of a subclass:

    * mode, for cp > 1: "ulysses", "gather", or "auto": what the config's cp_comm_type asks for ("a2a" is
      ulysses, "all_gather" gather), else ulysses where the KV heads divide (`mode` says which).
    * kernel: "te", "varlen", "sdpa", or "auto": the fastest that is there.

    No parameters, no state. Recomputing it alone (recompute_modules: core_attn) adds a gather.

    Raises:
        ValueError: what `check_supported` refuses, other than causal self-attention, arguments that it does
            not know, another cp_comm_type, or ulysses with KV heads that do not divide.
    """

    mode = "auto"
    kernel = "auto"

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: AttnMaskType = AttnMaskType.causal,
        attention_type: str = "self", attention_dropout: float | None = None,
        softmax_scale: float | None = None, k_channels: int | None = None, v_channels: int | None = None,
        cp_comm_type: str | None = None, pg_collection: Any = None, model_comm_pgs: Any = None,
        mode: str | None = None, kernel: str | None = None, **others: Any,
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        check_supported(config)
        self._check_causal(attn_mask_type)
        self.layer_number, self.softmax_scale = max(1, layer_number), softmax_scale
        self.mode, self.kernel = mode or self.mode, kernel or self.kernel
        refused = {n: v for n, v in {"attention_dropout": attention_dropout, **others}.items() if v}
        if attention_type != "self" or k_channels != v_channels:
            refused |= {"attention_type": attention_type, "k_channels": k_channels, "v_channels": v_channels}
        if refused:
            raise ValueError(f"DocumentAttention is self-attention without dropout, does not take {refused}")
        for name, value, known in (("mode", self.mode, MODES), ("kernel", self.kernel, KERNELS)):
            if value not in known:
                raise ValueError(f"DocumentAttention has no {name}={value!r}: use one of {', '.join(known)}")
        self.cp, tp = config.context_parallel_size, config.tensor_model_parallel_size
        if self.cp > 1:
            if cp_comm_type not in COMM_TYPES:
                raise ValueError(f"DocumentAttention has no cp_comm_type={cp_comm_type!r}: use a2a or all_gather")
            if self.mode == "auto":
                self.mode = COMM_TYPES[cp_comm_type]
            group = getattr(pg_collection or model_comm_pgs, "cp", None)
            self.cp_group = group or parallel_state.get_context_parallel_group()
            heads = max(1, (config.num_query_groups or config.num_attention_heads) // tp)
            if self.mode == "ulysses" and heads % self.cp:
                raise ValueError(
                    f"DocumentAttention mode='ulysses': num_query_groups={config.num_query_groups} over "
                    f"tensor_model_parallel_size={tp} leave {heads} KV heads, which do not divide by "
                    f"context_parallel_size={self.cp}: use mode='gather' (cp_comm_type all_gather) or 'auto'"
                )
            if self.mode == "auto":
                self.mode = "gather" if heads % self.cp else "ulysses"

    @staticmethod
    @functools.cache
    def with_mode(mode: str) -> type[DocumentAttention]:
        """The class with `mode` fixed, for the core_attention of a layer spec."""
        if mode not in MODES:
            raise ValueError(f"DocumentAttention has no mode={mode!r}: use one of {', '.join(MODES)}")
        return type(f"DocumentAttention_{mode}", (DocumentAttention,), {"mode": mode})

    @staticmethod
    def _check_causal(mask_type: AttnMaskType | None) -> None:
        if mask_type not in (None, AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"DocumentAttention is causal, got attn_mask_type={mask_type}")

    def _documents(self, params: PackedSeqParams | None, seq_length: int, batch: int) -> DocumentBoundaries:
        if params is None:
            return _whole_samples(seq_length, batch)
        if params.qkv_format != "sbhd":
            raise ValueError(f"DocumentAttention takes no batch with qkv_format={params.qkv_format!r}: build "
                             "packed_seq_params with document_boundaries()")  # fmt: skip
        if not isinstance(params, DocumentBoundaries):
            return document_boundaries(params.cu_seqlens_q, seq_length, batch)
        if (params.seq_length, params.boundaries[-1]) != (seq_length, seq_length * batch):
            raise ValueError(
                f"boundaries of {params.boundaries[-1]} tokens in samples of {params.seq_length} came with "
                f"{batch} samples of {seq_length} (local length * cp={self.cp}): build them for this batch"
            )
        return params

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None, attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend from the local queries.

        Args:
            query: [S/cp, b, heads, d], floating point; half precision for the CUDA kernels.
            key, value: [S/cp, b, kv_heads, d]; kv_heads divides heads.
            attention_mask: ignored: documents come in packed_seq_params, and all else is causal.
            packed_seq_params: from `document_boundaries`; None makes every sample one document. A plain sbhd
                PackedSeqParams is right too, but every layer reads its cu_seqlens_q back from the device.

        Returns:
            [S/cp, b, heads * d]

        Raises:
            ValueError: a thd batch, another batch's boundaries, more keys than queries, a bias, another mask.
        """
        self._check_causal(attn_mask_type)
        if attention_bias is not None:
            raise ValueError("DocumentAttention takes no attention_bias")
        s, b = query.shape[:2]
        if query.dim() != 4 or key.shape != value.shape or key.shape[:2] != (s, b) or (self.cp > 1 and s % 2):
            shapes = [tuple(t.shape) for t in (query, key, value)]
            raise ValueError(f"DocumentAttention takes [s, b, heads, d], s even if cp > 1, got {shapes}")
        documents = self._documents(packed_seq_params, s * self.cp, b)
        lengths = tuple(b - a for a, b in pairwise(documents.boundaries))
        kernel = functools.partial(_KERNELS[kernel_name(self.kernel, query)], scale=self.softmax_scale)

        if self.cp == 1:
            out = _join(kernel(_flat(query), _flat(key), _flat(value), lengths, lengths))
        elif self.mode == "ulysses":
            parts = [t.unflatten(2, (self.cp, -1)) for t in (query, key, value)]
            sizes = tuple(t.size(3) for t in parts)
            out = _join(kernel(*ToHeads.apply(torch.cat(parts, 3), self.cp_group, b, sizes), lengths, lengths))
            return ToSequence.apply(out, self.cp_group, b).flatten(2)
        else:
            plan = _chunk_plan(documents.boundaries, documents.seq_length, self.cp_group.rank(), self.cp)
            spans, nq, nk = zip(*plan, strict=True)
            local = LocalKV(key, value, self.cp_group)
            kv = GatherSpans.apply(key, value, local, spans)
            calls = zip(_flat(query).split(s // 2), kv, nq, nk, strict=True)
            with local.saving(kv[0]):
                out = _join([piece for q, part, *lengths in calls for piece in kernel(q, part, None, *lengths)])
        return out.reshape(b, s, -1).transpose(0, 1).contiguous()


def _flat(x: Tensor) -> Tensor:
    """[s, b, h, d] -> [b*s, h, d], a view where b is 1."""
    return x.transpose(0, 1).flatten(0, 1)


def _join(pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
