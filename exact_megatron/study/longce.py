"""LongCE (arXiv 2410.23771) in the native runner, as the published rival: weights by how much a target's long context helps.

    torchrun ... -m exact_megatron.study.longce --config FILE key=value ... study.short=128

A target's weight is min(exp(its loss when it sees K/2 to K tokens - its loss), 5), and 1 where it sees no more than K anyway. The short
losses come from the model itself, by two more forward passes over the same batch whose documents are cut every K tokens, the second time
K/2 later: of each cut part the second half counts. Weights are divided by their mean over a micro-batch, so that learning rate and
clipping act as in the other arms; the paper leaves them as they are.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch

from ..attention.boundaries import DocumentBoundaries, document_boundaries
from ..training.config import load_config
from ..training.data import get_batch
from ..training.trainer import Trainer

CAP = 5.0


class LongCE(Trainer):
    """Trainer whose losses are weighted by LongCE.

    Attributes:
        short: K in tokens, even.
    """

    short = 128

    def forward_step(self, loss_func: Any, iterator: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
        if not torch.is_grad_enabled():
            return super().forward_step(loss_func, iterator, model)
        batch, packed = get_batch(iterator, self.device, True)
        assert packed is not None

        def losses_with(boundaries: DocumentBoundaries) -> torch.Tensor:
            return model(
                batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=boundaries
            )

        losses = losses_with(packed)
        with torch.no_grad():
            weights = importance(losses.detach(), packed, self.short, losses_with, batch["loss_mask"] > 0)
        return losses, functools.partial(_weighted, loss_func, weights, batch["loss_mask"])


def importance(
    losses: torch.Tensor,
    boundaries: DocumentBoundaries,
    short: int,
    losses_with: Callable[[DocumentBoundaries], torch.Tensor],
    supervised: torch.Tensor,
) -> torch.Tensor:
    """LongCE's weights.

    Args:
        losses: float32 [b, S].
        boundaries: of the documents.
        short: K.
        losses_with: losses [b, S] of the same batch with other boundaries.
        supervised: bool [b, S]; the mean weight of these is 1.

    Returns:
        float32 [b, S].
    """
    weights = torch.ones_like(losses)
    half = short // 2
    for shift in (0, half):
        cuts, counts = cut_documents(boundaries.boundaries, short, shift)
        cut = document_boundaries(cuts, boundaries.seq_length, len(losses), device=losses.device)
        gain = (losses_with(cut).float() - losses).exp().clamp(max=CAP)
        weights = torch.where(torch.tensor(counts, device=losses.device).view_as(losses), gain, weights)
    return weights / weights[supervised].mean()


def cut_documents(boundaries: tuple[int, ...], short: int, shift: int) -> tuple[list[int], list[bool]]:
    """Boundaries of parts of `short` tokens, the first one of `shift` (0: whole), and the positions whose short loss counts: of every
    part but a document's first those with K/2 or more tokens of the part before them."""
    cuts, counts = [0], [False] * boundaries[-1]
    for start, end in pairwise(boundaries):
        for begin in range(start + (shift or short), end, short):
            cuts.append(begin)
            counts[begin + short // 2 : min(begin + short, end)] = [True] * max(
                0, min(begin + short, end) - begin - short // 2
            )
        cuts.append(end)
    return cuts, counts


def _weighted(loss_func: Any, weights: torch.Tensor, mask: torch.Tensor, losses: torch.Tensor) -> Any:
    total, count, _ = loss_func(mask, losses * weights)
    return total, count, loss_func(mask, losses.detach())[-1]  # what is logged is unweighted, as in every arm


def main(arguments: list[str]) -> None:
    """`train` with LongCE: --config FILE and key=value, study.short=K among them."""
    from ..utils.ranks import be_single_rank, is_rank

    own = [a for a in arguments if a.startswith("study.short=")]
    rest = [a for a in arguments if a not in own]
    files = [rest[i + 1] for i, word in enumerate(rest) if word == "--config"]
    overrides = [word for i, word in enumerate(rest) if word != "--config" and (i == 0 or rest[i - 1] != "--config")]
    run = load_config(files or None, overrides)
    if run.model.exact.enabled or run.model.pipeline_model_parallel_size > 1 or not run.model.data.document_masking:
        raise ValueError("LongCE needs masked documents, no EXACT and one pipeline stage")
    if not is_rank():
        be_single_rank()
    if own:
        LongCE.short = int(own[-1].partition("=")[2])
    LongCE(run).fit()


if __name__ == "__main__":
    main(sys.argv[1:])
