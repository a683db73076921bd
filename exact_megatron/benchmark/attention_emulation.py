"""The kernel calls of context-parallel ranks, one rank after another on one device, without communication.

For `exact-megatron benchmark attention`, and to check the kernels of several ranks on a single GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..attention.boundaries import Lengths, chunk_plan
from ..attention.kernels import KERNEL_FUNCTIONS, KERNELS, kernel_name
from .geometry import Shape
from .harness import SEED


@dataclass(frozen=True)
class Call:
    """A kernel call: its part of q, k, v of the whole micro-batch [b*S, heads, d], and the segments' lengths.

    `interleaved`: key and value come in one tensor [tokens, 2, kv_heads, d], as gather leaves them.
    """

    rows: slice
    columns: slice
    heads: slice
    kv_heads: slice
    queries: Lengths
    keys: Lengths
    interleaved: bool = False


def kernel_calls(shape: Shape, cuts: Lengths, mode: str, cp: int, rank: int) -> list[Call]:
    """What DocumentAttention calls its kernel with on this rank."""
    if mode == "ulysses":
        heads, kv_heads = (slice(n // cp * rank, n // cp * (rank + 1)) for n in (shape.heads, shape.kv_heads))
        lengths = tuple(b - a for a, b in pairwise(cuts))
        every = slice(0, cuts[-1])
        return [Call(every, every, heads, kv_heads, lengths, lengths)]
    heads, kv_heads = slice(0, shape.heads), slice(0, shape.kv_heads)
    plan = chunk_plan(cuts, shape.seq_length, rank, cp)
    return [Call(slice(s.stop - sum(nq), s.stop), s, heads, kv_heads, nq, nk, True) for s, nq, nk in plan]


def _place(call: Call) -> str:
    return repr((call.rows, call.columns, call.heads))  # a slice has no hash before Python 3.12


class Emulation:
    """Ranks one after another on one device: forward and backward of their kernel calls, nothing else.

    Args:
        kernel: of attention/kernels.py, or "auto".

    Raises:
        ValueError: there is no such kernel.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, kernel: str) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"--kernel {kernel} is not one of {', '.join(KERNELS)}")
        self.shape, self.device = shape, device
        generator = torch.Generator().manual_seed(SEED)
        total = shape.seq_length * shape.batch
        channels = shape.head_dim
        heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        drawn = [torch.randn(total, n, channels, generator=generator) for n in heads]
        self.whole = [t.to(device, dtype) for t in drawn]  # q, k, v and the output's gradient
        self.kernel = kernel_name(kernel, self.whole[0])

    def inputs(self, call: Call) -> list[Tensor]:
        """q, k, v (interleaved: q, kv) and the output's gradient of a call; contiguous, as the exchange leaves them."""
        q, k, v, grad = self.whole
        parts = [t[call.rows, call.heads] for t in (q, grad)] + [t[call.columns, call.kv_heads] for t in (k, v)]
        q, grad, k, v = (t.contiguous() for t in parts)
        return [q, torch.stack((k, v), 1), grad] if call.interleaved else [q, k, v, grad]

    @staticmethod
    def run(call: Call, inputs: list[Tensor], kernel: str) -> list[Tensor]:
        """Output, dq, dk, dv."""
        q, *kv = (t.detach().requires_grad_() for t in inputs[:-1])
        k, v = (*kv, None) if call.interleaved else kv
        parts = KERNEL_FUNCTIONS[kernel](q, k, v, call.queries, call.keys, scale=None)
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        dq, *dkv = torch.autograd.grad(out, (q, *kv), inputs[-1])
        return [out.detach(), dq, *(dkv[0].unbind(1) if call.interleaved else dkv)]

    def arm(self, rounds: Sequence[list[Call]]) -> Callable[[int], None]:
        """A rank's calls on the micro-batch of each round."""
        prepared: dict[str, list[Tensor]] = {}
        for call in (call for calls in rounds for call in calls):
            if _place(call) not in prepared:
                prepared[_place(call)] = self.inputs(call)
        jobs = [[(call, prepared[_place(call)]) for call in calls] for calls in rounds]

        def go(i: int) -> None:
            for call, tensors in jobs[i % len(jobs)]:
                self.run(call, tensors, self.kernel)
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return go

    def together(self, ranks: Sequence[list[Call]]) -> list[Tensor]:
        """Output, dq, dk, dv of the whole micro-batch, from the calls of all ranks."""
        q, k, v, _ = self.whole
        total = [torch.zeros_like(t, dtype=torch.float32) for t in (q, q, k, v)]
        for call in (call for calls in ranks for call in calls):
            out, dq, dk, dv = self.run(call, self.inputs(call), self.kernel)
            for whole, part in zip(total, (out, dq)):
                whole[call.rows, call.heads] += part
            for whole, part in zip(total[2:], (dk, dv)):
                whole[call.columns, call.kv_heads] += part
        return total

    def reference(self, call: Call) -> list[Tensor]:
        """The same by torch's attention, document by document: fp32 on a GPU, fp64 elsewhere."""
        exact = torch.float32 if self.device.type == "cuda" else torch.float64
        q, k, v, grad = (t.to(exact) for t in self.inputs(call))
        group = q.size(1) // k.size(1)  # repeated, since torch's fp32 kernels that save memory know no groups
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        out, dq, dk, dv = self.run(call, [q, k, v, grad], "sdpa")
        return [out, dq, *(t.unflatten(1, (-1, group)).sum(2) for t in (dk, dv))]


def relative_error(ours: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Largest difference over the largest value, of the worst tensor; NaN if there is one."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, reference, strict=True)]
    return float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max())
