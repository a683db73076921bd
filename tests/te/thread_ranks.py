"""Ranks of a context-parallel group as threads of one process: Transformer Engine is imported once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch

SECONDS = 60


class Group:
    """What DocumentAttention asks of a process group, and the collectives of context_parallel.py on it."""

    def __init__(self, size: int) -> None:
        self.place, self.barrier = threading.local(), threading.Barrier(size, timeout=SECONDS)
        self.sent: list[Any] = [None] * size

    def size(self) -> int:
        return len(self.sent)

    def rank(self) -> int:
        return self.place.rank

    def everyones(self, x: torch.Tensor) -> list[torch.Tensor]:
        assert x.is_contiguous()
        self.sent[self.rank()] = x
        self.barrier.wait()
        every = list(self.sent)
        self.barrier.wait()
        return every

    def run(self, function: Callable[[], Any]) -> list[Any]:
        """What `function` returns on each rank."""

        def go(rank: int) -> Any:
            self.place.rank = rank
            try:
                return function()
            except BaseException:
                self.barrier.abort()  # else the others wait
                raise

        with ThreadPoolExecutor(self.size()) as pool:
            ranks = [pool.submit(go, rank) for rank in range(self.size())]
        errors = [e for e in (rank.exception() for rank in ranks) if e is not None]
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return [rank.result() for rank in ranks]


def all_to_all_single(out: torch.Tensor, x: torch.Tensor, group: Group) -> None:
    out.copy_(torch.cat([part.chunk(group.size())[group.rank()] for part in group.everyones(x)]))


def all_gather_into_tensor(out: torch.Tensor, x: torch.Tensor, group: Group) -> None:
    out.copy_(torch.cat(group.everyones(x)))


def reduce_scatter_tensor(out: torch.Tensor, x: torch.Tensor, group: Group) -> None:
    out.copy_(torch.stack(group.everyones(x)).sum(0).chunk(group.size())[group.rank()])


COLLECTIVES = SimpleNamespace(
    all_to_all_single=all_to_all_single,
    all_gather_into_tensor=all_gather_into_tensor,
    reduce_scatter_tensor=reduce_scatter_tensor,
    get_backend=lambda group: "nccl",
)
