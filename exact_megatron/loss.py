"""The hook in the GPT loss: per-token losses times weights, divided by the whole number of supervised targets.

The weights arrive in `loss_mask` (0: not supervised, else the weight), which every Megatron host carries as float32 through
tensor-parallel broadcast, context-parallel slicing and to the last pipeline stage. Un-hooked, hosts truncate the sum of
`loss_mask` to a whole number and divide by that (Megatron-LM pretrain_gpt.py: loss_func); hence the check that no weighted
sample is drawn before a loss function is wrapped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state

from .allocation import WeightTable
from .config import ExactConfig, ExactError

# Names of the losses in reports and hosts' logs. LM_LOSS is a host's own, unweighted; "lm loss 1024-2047" is that of a bucket.
LM_LOSS = "lm loss"
EXACT_LOSS = "exact loss"


def bucket_loss(part: str) -> str:
    """Name of the unweighted loss of a part of the context range (`WeightTable.part_names`)."""
    return f"{LM_LOSS} {part}"


def bucket_of(name: str) -> str | None:
    """The part whose loss `name` is; None for losses of all targets."""
    return name.removeprefix(bucket_loss("")) if name.startswith(bucket_loss("")) else None


class ExactLoss:
    """Wraps a loss function `loss_func(loss_mask, output_tensor, ...)` of Megatron's form.

    One instance per run joins the two ends: `wrap` hooks the loss function, and the dataset builder calls `bind` with the
    weight table of the training stream before any sample is drawn.

    Every micro-batch is checked against the table, without communication and without waiting for the device; the counts are
    looked at after micro-batches 1, 2, 4, ..., 64 and then every 64th (on the CPU after each), and in `check`:

    * A weight that is not in the table ends the run.
    * Weights of 1 prove nothing: with normalization=none, or alpha=0, unweighted data have them too. So training ends when it has
      seen no weight of the tail, on any data- or context-parallel rank, for as many targets as cannot be chance (`_patience`).
    """

    def __init__(self, config: ExactConfig) -> None:
        self.config = config
        self.table: WeightTable | None = None
        self.wrapped = False
        self._markers = torch.empty(0)
        self._least_marker = 0
        self._patience = math.inf
        self._batches = 0
        self.calls = 0  # of wrapped loss functions, in training and validation
        # float64: targets and tail weights seen in training since a tail weight was looked for; strange weights, one of them
        self._counts: torch.Tensor | None = None

    @property
    def batches(self) -> int:
        """Micro-batches of training that the hook has seen since `bind`."""
        return self._batches

    def bind(self, table: WeightTable, longest_gap: int = 0) -> None:
        """Take the table whose weights the batches will carry.

        Args:
            table: of the training stream.
            longest_gap: samples that the stream has in a row, in the order in which they are drawn, without a target of
                `proving_context`; 0 where that is not known.

        Raises:
            ExactError: no loss function has been wrapped, so that the weights would be read as fractions of targets.
        """
        if not self.wrapped:
            raise ExactError(
                "the dataset is about to weight its targets, but no loss function is hooked: call ExactLoss.wrap(loss_func) "
                "and train with what it returns, or set model.exact.enabled=false"
            )
        self.table = table
        self._markers = torch.from_numpy(table.bucket_markers)
        self._least_marker, self._patience = proving_context(table)[0], _patience(table, longest_gap)
        self._batches = 0
        self._counts = None

    def wrap(self, loss_func: Callable[..., Any]) -> Callable[..., Any]:
        """Return `loss_func` with EXACT's weights.

        Args:
            loss_func: takes (loss_mask [b, s], output_tensor [b, s] per-token losses, ...) and returns a tuple that ends
                with a report {name: tensor [sum, count]}, as in Megatron-LM, Megatron-Bridge and the native runner.

        Returns:
            A function that hands `loss_func` the mask (weight != 0) and the weighted losses, so that its own sum, whole count
            and division are exact, and adds to the report the unweighted "lm loss", the "exact loss" and, with
            log_buckets, the unweighted loss of the short part and of each tail bucket (not of a placebo), each as float32 [sum, count].

        Raises:
            ExactError: `loss_func` is hooked already.
        """
        if getattr(loss_func, "exact_loss", None) is not None:
            raise ExactError(
                f"{getattr(loss_func, '__name__', loss_func)} is already hooked by EXACT: install the hook once"
            )

        @functools.wraps(loss_func)
        def hooked(loss_mask: torch.Tensor, output_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            losses = output_tensor.float()
            weights = loss_mask.float().view_as(losses)
            mask = (weights != 0).to(weights.dtype)
            report = self.report(losses.detach(), weights, mask, training=torch.is_grad_enabled())
            result = loss_func(mask, losses * weights, *args, **kwargs)
            return (*result[:-1], {**result[-1], **report})

        hooked.exact_loss = self  # type: ignore[attr-defined]
        self.wrapped = True
        return hooked

    @property
    def _buckets(self) -> bool:
        """Whether losses are reported by bucket; a placebo's weight does not tell one."""
        return self.config.log_buckets and not self.config.placebo

    @property
    def names(self) -> list[str]:
        """Names of what `report` gives, in its order, known on every rank, also where there is no loss; empty without a table."""
        if self.table is None:
            return []
        parts = self.table.part_names if self._buckets else []
        return [LM_LOSS, EXACT_LOSS, *map(bucket_loss, parts)]

    @torch.no_grad()
    def report(
        self, losses: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor, training: bool = False
    ) -> dict[str, torch.Tensor]:
        """Sums and counts for the log, {name: float32 [sum, count]}, of checked weights.

        Args:
            losses, weights, mask: float32, of one shape; mask is weights != 0.
            training: the batch is of the stream whose table is bound, so that tail weights are due.

        Raises:
            ExactError: no table is bound, or see the class.
        """
        table = self.table
        if table is None:
            raise ExactError(
                "the EXACT loss hook runs, but no weight table was bound: the data were not built by ExactDatasetBuilder. "
                "Build them with it, or set model.exact.enabled=false"
            )
        losses = losses.reshape(-1)
        weights = weights.reshape(-1)
        mask = mask.reshape(-1)
        self._markers = self._markers.to(weights.device)
        parts = weights == self._markers[:, None]
        self._watch(table, weights, parts, training)
        count = mask.sum()
        sums = [torch.stack([(losses * mask).sum(), count]), torch.stack([(losses * weights).sum(), count])]
        if self._buckets and len(table.bucket_markers):
            rows = parts.float()
            if len(table.part_names) > len(rows):
                rows = torch.cat([(mask - rows.sum(0))[None], rows])
            sums += torch.stack([rows @ losses, rows.sum(1)], dim=1).unbind()
        return dict(zip(self.names, sums, strict=True))

    def _watch(self, table: WeightTable, weights: torch.Tensor, parts: torch.Tensor, training: bool) -> None:
        if self._counts is None:
            self._counts = torch.tensor([0, 0, 0, -math.inf], dtype=torch.float64, device=weights.device)
        strange = (weights != 0) & (weights != float(table.lookup[0])) & ~parts.any(0)
        self._counts[2] += strange.sum()
        self._counts[3] = torch.maximum(self._counts[3], weights.where(strange, -math.inf).max())
        if training:
            self._counts[0] += (weights != 0).sum()
            self._counts[1] += parts[self._least_marker :].sum()
            self._batches += 1
        due = training and (self._batches % 64 == 0 or self._batches in (1, 2, 4, 8, 16, 32))
        if weights.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # a graph's replays go on counting; `check` looks
        if due or not weights.is_cuda:
            self.check()
        if due:
            self._check_tail(table)

    def check(self) -> None:
        """Look at the weights since `bind`. Waits for the device, does not communicate; for ends of steps and before saving.

        Raises:
            ExactError: a weight that is not in the table.
        """
        if self._counts is None or self.table is None:
            return
        _, _, strange, example = self._counts.tolist()
        if strange:
            known = self.table.lookup
            raise ExactError(
                f"a batch carries the weight {example:.9g}, which is not in the weight table {self.table.digest} "
                f"({known.min():.9g} to {known.max():.9g}): the data are unweighted, weighted by another table, or loss_mask was cast or "
                f"changed on its way to the loss ({strange:.0f} such targets on this rank). Checkpoints since the last check are suspect"
            )

    def _check_tail(self, table: WeightTable) -> None:
        """Collective over the data- and context-parallel ranks, which have seen equally many micro-batches."""
        assert self._counts is not None
        if math.isinf(self._patience):
            return
        seen = self._counts[:2].clone()
        if parallel_state.model_parallel_is_initialized():
            torch.distributed.all_reduce(seen, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        targets, tail = seen.tolist()
        if tail:
            self._counts[:2] = 0
        elif targets >= self._patience:
            raise ExactError(
                f"no weight of the tail in the last {targets:.0f} targets of training, although {table.tail_share:.2%} of the stream's "
                f"targets are in the tail (table {table.digest}): the data have lost their weights on the way to the loss, or are not "
                "the data that were counted. Look at what changes loss_mask between the dataset and the loss, or set "
                "model.exact.enabled=false"
            )


def proving_context(table: WeightTable) -> tuple[int, int]:
    """From where on a weight can only be the table's: (number of a marker, least effective context that it marks).

    Those are the markers behind the last one that is exactly 1, which unweighted data have too; if there is none, (the number of
    markers, S + 1).
    """
    first = max((i + 1 for i, marker in enumerate(table.bucket_markers) if marker == 1), default=0)
    return first, int(table.edges[table.tail[first]]) if first < len(table.bucket_markers) else table.seq_length + 1


def _patience(table: WeightTable, longest_gap: int) -> float:
    """How many targets without a weight of `proving_context` are a fault; infinite where nothing tells weighted data from others.

    Of the stream's n targets c have such a weight. One sample holds at most m = S + 1 - a of them, with a their least effective
    context, so that c / m samples or more have one, and a sample drawn at random has none with probability <= 1 - (c / m) / samples.
    V targets are those of V / n * samples samples, all of which are without with probability <= exp(-V c / (n m)): 1e-12 at
    V = 27.6 n m / c. That holds for samples in random order, which Megatron's are, but for blends and a last epoch of some documents
    only: a longer gap in the order in which they are drawn is allowed for, twice.
    """
    _, least = proving_context(table)
    tail, targets = int(table.counts[least:].sum()), int(table.counts.sum())
    if not tail:
        return math.inf
    chance = -math.log(1e-12) * targets / tail * (table.seq_length + 1 - least)
    return max(chance, 2.0 * longest_gap * table.seq_length)


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
    return loss, count, {LM_LOSS: torch.stack([loss.detach(), count.float()])}
