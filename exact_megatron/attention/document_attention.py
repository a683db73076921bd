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
from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from .boundaries import DocumentBoundaries, chunk_plan, document_boundaries, whole_samples
from .context_parallel import GatherSpans, LocalKV, ToHeads, ToSequence
from .kernels import KERNEL_FUNCTIONS, KERNELS, kernel_name
from .multi_token_prediction import roll_within_documents
from .supported import COMM_TYPES, check_supported

MODES = ("auto", "ulysses", "gather")


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
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        model_comm_pgs: Any = None,
        mode: str | None = None,
        kernel: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__(config=config)
        check_supported(config)
        if getattr(config, "mtp_num_layers", None):
            roll_within_documents()
        self._check_causal(attn_mask_type)
        self.layer_number = max(1, layer_number)
        self.softmax_scale = softmax_scale
        self.mode = mode or self.mode
        self.kernel = kernel or self.kernel
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
            return whole_samples(seq_length, batch)
        if params.qkv_format != "sbhd":
            raise ValueError(
                f"DocumentAttention takes no batch with qkv_format={params.qkv_format!r}: build "
                "packed_seq_params with document_boundaries()"
            )
        if not isinstance(params, DocumentBoundaries):
            return document_boundaries(params.cu_seqlens_q, seq_length, batch)
        if (params.seq_length, params.boundaries[-1]) != (seq_length, seq_length * batch):
            raise ValueError(
                f"boundaries of {params.boundaries[-1]} tokens in samples of {params.seq_length} came with "
                f"{batch} samples of {seq_length} (local length * cp={self.cp}): build them for this batch"
            )
        return params

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
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
        kernel = functools.partial(KERNEL_FUNCTIONS[kernel_name(self.kernel, query)], scale=self.softmax_scale)

        if self.cp == 1:
            out = _join(kernel(_flat(query), _flat(key), _flat(value), lengths, lengths))
        elif self.mode == "ulysses":
            parts = [t.unflatten(2, (self.cp, -1)) for t in (query, key, value)]
            sizes = tuple(t.size(3) for t in parts)
            out = _join(kernel(*ToHeads.apply(torch.cat(parts, 3), self.cp_group, b, sizes), lengths, lengths))
            return ToSequence.apply(out, self.cp_group, b).flatten(2)
        else:
            plan = chunk_plan(documents.boundaries, documents.seq_length, self.cp_group.rank(), self.cp)
            spans, nq, nk = zip(*plan, strict=True)
            local = LocalKV(key, value, self.cp_group)
            kv = GatherSpans.apply(key, value, local, spans)
            calls = zip(_flat(query).split(s // 2), kv, nq, nk, strict=True)
            with local.saving(kv[0]):
                out = _join([out for q, part, *lengths in calls for out in kernel(q, part, None, *lengths)])
        return out.reshape(b, s, -1).transpose(0, 1).contiguous()


def _flat(x: Tensor) -> Tensor:
    """[s, b, h, d] -> [b*s, h, d], a view where b is 1."""
    return x.transpose(0, 1).flatten(0, 1)


def _join(outputs: list[Tensor]) -> Tensor:
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
