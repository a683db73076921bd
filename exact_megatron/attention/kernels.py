"""The kernels inside DocumentAttention: Transformer Engine's thd attention, torch's varlen_attn, or
scaled_dot_product_attention document by document.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .boundaries import Lengths
from .supported import DETERMINISTIC_LIMIT

KERNELS = ("auto", "te", "varlen", "sdpa")


@functools.lru_cache(maxsize=256)
def _cu_seqlens(lengths: Lengths, device: torch.device) -> Tensor:
    # a blocking copy would wait for the whole stream
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


# Kernels: query [tq, heads, d], key and value [tk, kv_heads, d], lengths -> outputs, together [tq, heads, d]. Key and value
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
    outputs = []
    gqa = q.size(1) != k.size(1)
    # split, not slices: its backward is one concatenation, not a zero-filled tensor per document
    for part in zip(q.split(nq), k.split(nk), v.split(nk), strict=True):
        qi, ki, vi = (t.transpose(0, 1).unsqueeze(0) for t in part)
        rows = qi.size(2)
        columns = ki.size(2)
        mask = None
        if 1 < rows < columns:  # is_causal would put the triangle at the upper left
            mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        square = rows == columns
        out = F.scaled_dot_product_attention(qi, ki, vi, mask, 0.0, square, scale=scale, enable_gqa=gqa)
        outputs.append(out.squeeze(0).transpose(0, 1))
    return outputs


def _varlen(q: Tensor, k: Tensor, v: Tensor | None, nq: Lengths, nk: Lengths, scale: float | None) -> list[Tensor]:
    """torch's varlen_attn (CUDA, half precision); window (-1, 0) is causal, aligned at the lower right."""
    from torch.nn.attention.varlen import varlen_attn

    k, v = _apart(k, v)
    cu = [_cu_seqlens(n, q.device) for n in (nq, nk)]
    # torch 2.11 has no such argument and hands any number of KV heads to flash attention, whose kernels take them
    gqa = {"enable_gqa": q.size(1) != k.size(1)} if "enable_gqa" in _arguments(varlen_attn) else {}
    return [varlen_attn(q, k, v, *cu, max(nq), max(nk), scale=scale, window_size=(-1, 0), **gqa)]


@functools.cache
def te_module(heads: int, kv_heads: int, channels: int, scale: float | None) -> Any:
    import transformer_engine.pytorch as te

    # knows no parallelism, only the heads that are there; outside the model, so not in checkpoints
    return te.DotProductAttention(
        heads, channels, num_gqa_groups=kv_heads, attention_dropout=0.0, qkv_format="thd", softmax_scale=scale
    )


def deterministic_groups(nq: Lengths, nk: Lengths, heads: int) -> list[slice]:
    """Neighbouring documents, as many in a group as stay below DETERMINISTIC_LIMIT; a document that does not is alone."""
    groups = [slice(0, 1)]
    for i in range(1, len(nq)):
        start = groups[-1].start
        size = (i + 1 - start) * heads * max(nq[start : i + 1]) * max(nk[start : i + 1])
        if size < DETERMINISTIC_LIMIT:
            groups[-1] = slice(start, i + 1)
        else:
            groups.append(slice(i, i + 1))
    return groups


def _te(q: Tensor, k: Tensor, v: Tensor | None, nq: Lengths, nk: Lengths, scale: float | None) -> list[Tensor]:
    """Transformer Engine (CUDA, half precision); the mask of gather needs cuDNN >= 9.7 or flash-attn."""
    if not torch.are_deterministic_algorithms_enabled() or torch.cuda.get_device_capability(q.device) != (9, 0):
        return [_te_call(q, k, v, nq, nk, scale)]
    groups = deterministic_groups(nq, nk, q.size(1))
    if len(groups) == 1:
        return [_te_call(q, k, v, nq, nk, scale)]
    tokens_q, tokens_k = ([sum(lengths[group]) for group in groups] for lengths in (nq, nk))
    # Copies, since Transformer Engine rejects parts that do not start at 0; what is declared to be interleaved may.
    parts_q = [part.clone(memory_format=torch.contiguous_format) for part in q.split(tokens_q)]
    parts_k = k.split(tokens_k)
    parts_v: Sequence[Tensor | None] = [None] * len(groups)
    if v is not None:
        parts_k, parts_v = (
            [part.clone(memory_format=torch.contiguous_format) for part in t.split(tokens_k)] for t in (k, v)
        )
    return [
        _te_call(part_q, part_k, part_v, nq[group], nk[group], scale)
        for part_q, part_k, part_v, group in zip(parts_q, parts_k, parts_v, groups, strict=True)
    ]


def _te_call(q: Tensor, k: Tensor, v: Tensor | None, nq: Lengths, nk: Lengths, scale: float | None) -> Tensor:
    module = te_module(q.size(1), k.size(-2), q.size(2), scale)
    if v is None and "kv_layer" not in _arguments(type(module).forward):  # older versions: copies start at offset 0
        k, v = (t.clone(memory_format=torch.contiguous_format) for t in k.unbind(1))
    kv = {"key_layer": k, "value_layer": v}
    if v is None:
        kv = {"key_layer": None, "value_layer": None, "kv_layer": k}
    mask = "padding_causal" if nq == nk else "padding_causal_bottom_right"
    cu_q, cu_k = (_cu_seqlens(n, q.device) for n in (nq, nk))
    out = module(
        q,
        **kv,
        qkv_format="thd",
        cu_seqlens_q=cu_q,
        cu_seqlens_kv=cu_k,
        max_seqlen_q=max(nq),
        max_seqlen_kv=max(nk),
        attn_mask_type=mask,
    )
    return out.view(q.shape)


KERNEL_FUNCTIONS: dict[str, Callable[..., list[Tensor]]] = {"te": _te, "varlen": _varlen, "sdpa": _sdpa}


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
