"""Effective context of the targets of a batch of tensors, for training loops without Megatron's datasets. torch, on the batch's device.

Nothing here waits for the device, and nothing depends on values: it can be compiled and captured.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNSUPERVISED = -1


def effective_contexts(
    labels: Tensor,
    *,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_padded: Tensor | None = None,
    document_ids: Tensor | None = None,
    continues: bool | Tensor = False,
    shifted: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    """Effective context of every label (`exposure.effective_context`, batched and on the device).

    Documents are given in one of three ways, each of which every packing collator has at hand:

    Args:
        labels: int [S] or [b, S]; `ignore_index` marks what is not supervised.
        position_ids: int, of labels' shape. A document begins where they do not go on by 1. What counts is the distance to where the
            document begins in its row, not the value: a row that begins in the middle of a document may begin at any position.
        cu_seqlens: int [n + 1], boundaries in the rows laid end to end (Transformer Engine, flash-attn; a row begins where a boundary says
            so), or int [b, n + 1], those of each row. Boundaries may repeat, as in arrays of fixed size; tokens after the last are padding.
        cu_seqlens_padded: int, like cu_seqlens: where the documents lie, if each is followed by padding, as Transformer Engine has it.
        document_ids: int, of labels' shape; a document begins where they change.
        continues: bool, or bool [b]: the document at a row's end goes on after it, so that the row's last label is a token of it.
            False gives this label 0, which is the context of another document's first token. Without effect if not `shifted`.
        shifted: labels[t] is the token after input t, as in Megatron-LM and torchtitan. False: labels[t] is input t itself, as
            Hugging Face's models take it, which shift it on their own. A wrong value moves every weight by one target, and with it
            all document boundaries.
        ignore_index: see labels.

    Returns:
        int64 like labels: tokens of its own document that a label's prediction sees, UNSUPERVISED (-1) where there is no target.

    Raises:
        ValueError: documents given in no way or in several, or tensors whose shapes do not fit.
    """
    given = {"position_ids": position_ids, "cu_seqlens": cu_seqlens, "document_ids": document_ids}
    ways = [name for name, value in given.items() if value is not None]
    if len(ways) != 1:
        raise ValueError(f"give the documents by one of {', '.join(given)}, not by {' and '.join(ways) or 'none'}")
    if labels.dim() not in (1, 2) or labels.numel() == 0:
        raise ValueError(f"labels must be [S] or [batch, S] and not empty, not {list(labels.shape)}")
    if cu_seqlens_padded is not None and (cu_seqlens is None or cu_seqlens_padded.shape != cu_seqlens.shape):
        raise ValueError("cu_seqlens_padded goes with a cu_seqlens of its shape")
    rows = labels.reshape(-1, labels.size(-1))
    if cu_seqlens is not None:
        offset, left = _by_boundaries(rows, cu_seqlens, cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded)
    else:
        values = position_ids if position_ids is not None else document_ids
        assert values is not None
        if values.shape != labels.shape:
            raise ValueError(f"{ways[0]} has the shape {list(values.shape)}, labels {list(labels.shape)}")
        offset, left = _by_starts(_starts(values.reshape(rows.shape), 1 if position_ids is not None else 0))
    real = left > 0
    if shifted:
        inside = left > 1
        last = torch.as_tensor(continues, device=rows.device).reshape(-1, 1).expand(len(rows), 1)
        inside = torch.cat([inside[:, :-1], inside[:, -1:] | (last & real[:, -1:])], 1)
        context = torch.where(inside, offset + 1, torch.zeros_like(offset))
    else:
        context = offset
        real = real & (torch.arange(rows.size(1), device=rows.device) > 0)  # nothing predicts a row's first token
    return torch.where(real & (rows != ignore_index), context, torch.full_like(context, UNSUPERVISED)).view(
        labels.shape
    )


def _starts(values: Tensor, step: int) -> Tensor:
    """bool [b, S]: a document begins, where `values` do not go on by `step` (0: stay the same)."""
    first = torch.ones_like(values[:, :1], dtype=torch.bool)
    return torch.cat([first, values[:, 1:] != values[:, :-1] + step], 1)


def _by_starts(starts: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [b, S]: tokens since the document's first one in its row, and tokens up to its end, the token itself counted."""
    at = torch.arange(starts.size(1), device=starts.device).expand(starts.shape)
    begin = torch.where(starts, at, torch.zeros_like(at)).cummax(1).values
    after = (
        torch.where(starts, at, torch.full_like(at, starts.size(1))).flip(1).cummin(1).values.flip(1)
    )  # next start from here on
    end = torch.cat([after[:, 1:], torch.full_like(after[:, :1], starts.size(1))], 1)
    return at - begin, end - at


def _by_boundaries(rows: Tensor, cu_seqlens: Tensor, placed: Tensor) -> tuple[Tensor, Tensor]:
    """As `_by_starts`; of padding the second is 0 or less."""
    if (
        cu_seqlens.dim() not in (1, 2)
        or cu_seqlens.size(-1) < 2
        or cu_seqlens.dim() == 2
        and len(cu_seqlens) != len(rows)
    ):
        raise ValueError(f"cu_seqlens must be [n + 1] or [{len(rows)}, n + 1], not {list(cu_seqlens.shape)}")
    flat = cu_seqlens.dim() == 1
    at = torch.arange(rows.numel() if flat else rows.size(1), device=rows.device)
    boundaries, placed = cu_seqlens.reshape(-1, cu_seqlens.size(-1)).long(), placed.reshape(-1, placed.size(-1)).long()
    at = at.expand(len(placed), -1).contiguous()
    document = torch.searchsorted(placed[:, 1:].contiguous(), at, right=True)
    known = document < boundaries.size(1) - 1
    document = document.clamp(max=boundaries.size(1) - 2)
    offset = at - placed.gather(1, document)
    left = boundaries.diff(dim=1).gather(1, document) - offset
    left = torch.where(known, left, torch.zeros_like(left))
    return offset.view(rows.shape), left.view(rows.shape)
