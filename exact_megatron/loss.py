"""The hook in the GPT loss: per-token losses times weights, divided by the whole number of supervised targets.

The weights arrive in `loss_mask` (0: not supervised, else the weight), which every Megatron host carries as float32 through
tensor-parallel broadcast, context-parallel slicing and to the last pipeline stage. Un-hooked, hosts truncate the sum of
`loss_mask` to a whole number and divide by that (Megatron-LM pretrain_gpt.py: loss_func); hence the check that no weighted
sample is drawn before a loss function is wrapped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .allocation import WeightTable
from .config import ExactConfig, ExactError


class ExactLoss:
    """Wraps a loss function `loss_func(loss_mask, output_tensor, ...)` of Megatron's form.

    One instance per run joins the two ends: `wrap` hooks the loss function, and the dataset builder calls `bind` with the
    weight table of the training stream before any sample is drawn.
    """

    def __init__(self, config: ExactConfig) -> None:
        self.config = config
        self.table: WeightTable | None = None
        self.wrapped = False
        self._marks: torch.Tensor | None = None
        self._checked = False

    def bind(self, table: WeightTable) -> None:
        """Take the table whose weights the batches will carry.

        Raises:
            ExactError: no loss function has been wrapped, so that the weights would be read as fractions of targets.
        """
        if not self.wrapped:
            raise ExactError(
                "the dataset is about to weight its targets, but no loss function is hooked: call ExactLoss.wrap(loss_func) "
                "and train with what it returns, or set model.exact.enabled=false"
            )
        self.table = table
        self._marks = None
        self._checked = False

    def wrap(self, loss_func: Callable[..., Any]) -> Callable[..., Any]:
        """Return `loss_func` with EXACT's weights.

        Args:
            loss_func: takes (loss_mask [b, s], output_tensor [b, s] per-token losses, ...) and returns a tuple that ends
                with a report {name: tensor [sum, count]}, as in Megatron-LM, Megatron-Bridge and the native runner.

        Returns:
            A function that hands `loss_func` the mask (weight != 0) and the weighted losses, so that its own sum, whole count
            and division are exact, and adds to the report the unweighted "lm loss", the "exact loss" and, with
            log_buckets, the unweighted loss of the short part and of each tail bucket, each as float32 [sum, count].

        Raises:
            ExactError: `loss_func` is hooked already.
        """
        if getattr(loss_func, "exact_loss", None) is not None:
            raise ExactError(f"{loss_func.__name__} is already hooked by EXACT: install the hook once")

        @functools.wraps(loss_func)
        def hooked(loss_mask: torch.Tensor, output_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            losses = output_tensor.float()
            weights = loss_mask.float().view_as(losses)
            mask = (weights != 0).to(weights.dtype)
            result = loss_func(mask, losses * weights, *args, **kwargs)
            return (*result[:-1], {**result[-1], **self.report(losses.detach(), weights, mask)})

        hooked.exact_loss = self  # type: ignore[attr-defined]
        self.wrapped = True
        return hooked

    @torch.no_grad()
    def report(self, losses: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sums and counts for the log, {name: float32 [sum, count]}; no communication."""
        table = self.table
        if table is None:
            raise ExactError(
                "the EXACT loss hook runs, but no weight table was bound: the data were not built by ExactDatasetBuilder. "
                "Build them with it, or set model.exact.enabled=false"
            )
        losses, weights, mask = losses.reshape(-1), weights.reshape(-1), mask.reshape(-1)
        if self._marks is None or self._marks.device != weights.device:
            self._marks = torch.from_numpy(table.marks).to(weights.device)
        if not self._checked:
            self._check_weights(table, weights)
        count = mask.sum()
        report = {
            "lm loss": torch.stack([(losses * mask).sum(), count]),
            "exact loss": torch.stack([(losses * weights).sum(), count]),
        }
        if self.config.log_buckets and len(table.marks):
            parts = (weights == self._marks[:, None]).float()
            if len(table.part_names) > len(parts):
                parts = torch.cat([(mask - parts.sum(0))[None], parts])
            sums = torch.stack([parts @ losses, parts.sum(1)], dim=1)
            report.update({f"lm loss {name}": row for name, row in zip(table.part_names, sums)})
        return report

    def _check_weights(self, table: WeightTable, weights: torch.Tensor) -> None:
        known = torch.from_numpy(table.lookup).to(weights.device).unique()
        strange = weights[(weights != 0) & ~torch.isin(weights, known)]
        if strange.numel():
            raise ExactError(
                f"a batch carries the weight {strange[0].item():.9g}, which is not in the weight table {table.digest} "
                f"({known.min().item():.9g} to {known.max().item():.9g}): the data are unweighted, weighted by another table, or "
                "loss_mask was cast or changed on its way to the loss"
            )
        self._checked = True


def gpt_loss(
    loss_mask: torch.Tensor, output_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The plain GPT loss as Megatron-LM has it (pretrain_gpt.py: loss_func).

    Returns:
        (sum of the masked losses, int32 number of supervised targets, {"lm loss": float32 [sum, count]}).
    """
    losses = output_tensor.view(-1).float()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses * mask)
    count = mask.sum().clone().detach().to(torch.int)
    return loss, count, {"lm loss": torch.stack([loss.detach(), count.float()])}
