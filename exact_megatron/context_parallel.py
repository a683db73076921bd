"""Exchanges over the context-parallel group, for attention.py. The batch is Megatron's whole-sequence zigzag.

What is sent is made contiguous first, gradients above all: empty_like keeps the strides of a permuted tensor, and the
collective then fills other places than meant without an error.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@functools.cache
def _zigzag(cp: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the 2*cp chunks stand in rank-major order (rank 0's two, rank 1's two, ...), and the inverse."""
    place = torch.tensor([2 * c if c < cp else 4 * cp - 1 - 2 * c for c in range(2 * cp)])
    return place.to(device), place.argsort().to(device)


def _exchange(x: Tensor, group: dist.ProcessGroup, batch: int, to_heads: bool) -> Tensor:
    """Between [S/cp, b, cp, h, d], cut along the sequence, and [b*S, h, d], this rank's part of the heads."""
    cp, rest = group.size(), x.shape[-2:]
    place, inverse = _zigzag(cp, x.device)
    if to_heads:
        x = x.permute(2, 0, 1, 3, 4)
    else:
        x = x.reshape(batch, 2 * cp, -1, *rest).permute(1, 2, 0, 3, 4).index_select(0, inverse)
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    if to_heads:
        return out.view(2 * cp, -1, batch, *rest).permute(2, 0, 1, 3, 4).index_select(1, place).flatten(0, 2)
    return out.view(cp, -1, batch, *rest).permute(1, 2, 0, 3, 4)


class Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, batch: int, to_heads: bool) -> Tensor:
        ctx.back = group, batch, not to_heads
        return _exchange(x, group, batch, to_heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad, *ctx.back), None, None, None


def _gather(k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
    """k and v [S/cp, b, kv_heads, d] of every rank -> [2, b*S, kv_heads, d] in sequence order."""
    cp = group.size()
    mine = torch.stack([t.unflatten(0, (2, -1)) for t in (k, v)], 1).contiguous()
    every = mine.new_empty(2 * cp, *mine.shape[1:])
    dist.all_gather_into_tensor(every, mine, group=group)
    return every.permute(1, 3, 0, 2, 4, 5).index_select(2, _zigzag(cp, k.device)[0]).flatten(1, 3)


class GatherSpans(torch.autograd.Function):
    """k and v [S/cp, b, kv_heads, d] -> key, value, key, value, ... of slices of the flattened batch."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, group: dist.ProcessGroup, spans: Any) -> tuple[Tensor, ...]:
        ctx.group, ctx.spans, ctx.shape = group, spans, k.shape
        every = _gather(k, v, group)
        return tuple(t[span] for span in spans for t in every)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group, cp, (s, b, *rest) = ctx.group, ctx.group.size(), ctx.shape
        total = grads[0].new_zeros(2, b * s * cp, *rest)
        for i, grad in enumerate(grads):
            total[i % 2, ctx.spans[i // 2]] += grad
        total = total.view(2, b, 2 * cp, s // 2, *rest).permute(2, 0, 3, 1, 4, 5)
        total = total.index_select(0, _zigzag(cp, total.device)[1]).contiguous()
        if dist.get_backend(group) == "nccl":
            mine = total.new_empty(2, *total.shape[1:])
            dist.reduce_scatter_tensor(mine, total, group=group)
        else:  # gloo lacks reduce_scatter for some dtypes
            dist.all_reduce(total, group=group)
            mine = total[2 * group.rank() :][:2]
        return mine[:, 0].reshape(ctx.shape), mine[:, 1].reshape(ctx.shape), None, None


def keep_local(gathered: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> saved_tensors_hooks:
    """Where a kernel saves a part of the gathered K/V, save only its place; backward gathers once more.

    Every rank's kernel saves some of it, so all ranks join in. A kernel that saves copies only costs memory.
    """
    storage, k, v = gathered.untyped_storage().data_ptr(), k.detach(), v.detach()
    saved, left, every = 0, 0, None

    def pack(t: Tensor) -> Any:
        nonlocal saved
        if t.untyped_storage().data_ptr() != storage:
            return t
        saved += 1
        return t.size(), t.stride(), t.storage_offset()

    def unpack(packed: Any) -> Tensor:
        nonlocal left, every
        if isinstance(packed, Tensor):
            return packed
        if every is None:
            every, left = _gather(k, v, group), saved
        t, left = every.as_strided(*packed), left - 1
        if not left:
            every = None
        return t

    return saved_tensors_hooks(pack, unpack)
