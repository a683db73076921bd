"""Sums of what ExactLoss reports, for hosts whose own log carries one loss: added over micro-batches, reduced over ranks."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from ..config import ExactError
from ..loss import ExactLoss
from .host import UNWEIGHTED


class LossSums:
    """What the loss hook reported since the last `clear`, {name: float32 [sum, count]} of this rank."""

    def __init__(self, loss: ExactLoss) -> None:
        self.loss = loss
        self.sums: dict[str, torch.Tensor] = {}

    def names(self) -> list[str]:
        """What ExactLoss reports.

        Raises:
            ExactError: no weighted data were built.
        """
        if self.loss.table is None:
            raise ExactError(UNWEIGHTED)
        return self.loss.names

    def add(self, report: dict[str, torch.Tensor]) -> None:
        for name, pair in report.items():
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def reduced(self) -> dict[str, torch.Tensor]:
        """Clear, and return averages over all targets of all ranks, on every rank; NaN without targets. Two small collectives."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        total = torch.stack([self.sums.pop(name, torch.zeros(2, device=device)) for name in self.names()])
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(total, last, group=parallel_state.get_pipeline_model_parallel_group())
        return dict(zip(self.names(), total[:, 0] / total[:, 1]))
