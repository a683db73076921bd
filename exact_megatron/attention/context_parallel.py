"""Exchanges over the context-parallel group, for document_attention.py. The batch is Megatron's whole-sequence zigzag.

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


def _all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


def _to_heads(x: Tensor, group: dist.ProcessGroup, batch: int, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    cp = group.size()
    rest = x.shape[-2:]
    every = _all_to_all(x.permute(2, 0, 1, 3, 4), group).view(2 * cp, -1, batch, *rest).permute(2, 0, 1, 3, 4)
    place = _zigzag(cp, x.device)[0]
    # each its own memory: views of one would be copied by kernels that take no views
    return tuple(part.index_select(1, place).flatten(0, 2) for part in every.split(sizes, 3))


def _to_sequence(parts: tuple[Tensor, ...], group: dist.ProcessGroup, batch: int) -> Tensor:
    cp = group.size()
    x = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    rest = x.shape[-2:]
    x = x.reshape(batch, 2 * cp, -1, *rest).permute(1, 2, 0, 3, 4).index_select(0, _zigzag(cp, x.device)[1])
    return _all_to_all(x, group).view(cp, -1, batch, *rest).permute(1, 2, 0, 3, 4)


class ToHeads(torch.autograd.Function):
    """[S/cp, b, cp, h, d], cut along the sequence -> [b*S, n, d] for each n of sizes, this rank's part of the heads."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, batch: int, sizes: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        ctx.back = group, batch
        return _to_heads(x, group, batch, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _to_sequence(grads, *ctx.back), None, None, None


class ToSequence(torch.autograd.Function):
    """[b*S, h, d], this rank's part of the heads -> [S/cp, b, cp, h, d], cut along the sequence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, batch: int) -> Tensor:
        ctx.back = group, batch, (x.size(1),)
        return _to_sequence((x,), group, batch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_to_heads(grad, *ctx.back), None, None


def _gather(k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
    """k and v [S/cp, b, kv_heads, d] of every rank -> [b*S, 2, kv_heads, d] in sequence order."""
    cp = group.size()
    mine = torch.stack((k, v), 2).contiguous().unflatten(0, (2, -1))
    every = mine.new_empty(2 * cp, *mine.shape[1:])
    dist.all_gather_into_tensor(every, mine, group=group)
    return every.transpose(1, 2).transpose(0, 1).index_select(1, _zigzag(cp, k.device)[0]).flatten(0, 2)


class GatherSpans(torch.autograd.Function):
    """k and v [S/cp, b, kv_heads, d] -> [tokens, 2, kv_heads, d], key and value, for each span of the flattened batch."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, local: LocalKV, spans: Any) -> tuple[Tensor, ...]:
        group = local.group
        ctx.group = group
        ctx.local = local
        ctx.spans = spans
        ctx.shape = k.shape
        every = _gather(k, v, group)
        return tuple(every[span] for span in spans)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group = ctx.group
        cp = ctx.group.size()
        (s, b, *rest) = ctx.shape
        ctx.local.end_backward()
        total = grads[0].new_zeros(b * s * cp, 2, *rest)
        for span, grad in zip(ctx.spans, grads, strict=True):
            total[span] += grad
        total = total.view(b, 2 * cp, s // 2, 2, *rest).permute(1, 2, 0, 3, 4, 5)
        total = total.index_select(0, _zigzag(cp, total.device)[1]).contiguous()
        if dist.get_backend(group) == "nccl":
            mine = total.new_empty(2, *total.shape[1:])
            dist.reduce_scatter_tensor(mine, total, group=group)
        else:  # gloo lacks reduce_scatter for some dtypes
            dist.all_reduce(total, group=group)
            mine = total[2 * group.rank() :][:2]
        grad_k, grad_v = (t.contiguous() for t in mine.flatten(0, 1).unbind(2))
        return grad_k, grad_v, None, None


class LocalKV:
    """Keeps the local K/V for backward, in place of the gathered ones that a kernel saves a part of, and gathers again there.

    A kernel may save copies instead, and another one on another rank: each rank gathers once in each backward all the same, so
    that the group's collectives stay in step. Copies only cost memory.
    """

    def __init__(self, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> None:
        self.k = k.detach()
        self.v = v.detach()
        self.group = group
        self.saved = self.left = 0
        self.every: Tensor | None = None
        self.gathered = False

    def saving(self, gathered: Tensor) -> saved_tensors_hooks:
        """Hooks for the forward of the kernels that read `gathered`."""
        storage = gathered.untyped_storage().data_ptr()

        def pack(t: Tensor) -> Any:
            if t.untyped_storage().data_ptr() != storage:
                return t
            self.saved += 1
            return t.size(), t.stride(), t.storage_offset()

        return saved_tensors_hooks(pack, self._unpack)

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if self.every is None:
            self.every = _gather(self.k, self.v, self.group)
            self.left = self.saved
            self.gathered = True
        part = self.every.as_strided(*packed)
        self.left = self.left - 1
        if not self.left:
            self.every = None
        return part

    def end_backward(self) -> None:
        """Take part in the gather of this backward if no kernel of this rank needed it."""
        if not self.gathered:
            _gather(self.k, self.v, self.group)
        self.gathered = False
