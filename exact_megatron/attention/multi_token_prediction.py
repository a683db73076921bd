"""Multi-token prediction on packed documents: what megatron.core rolls to the left stays inside its document.

For every depth megatron.core rolls token ids, positions, labels and loss_mask one position to the left (`roll_tensor` in
megatron/core/transformer/multi_token_prediction.py), so that a target's weight goes with it. From 0.16 to 0.19 `roll_tensor` takes every
packed_seq_params for a thd batch: it cuts the rows of [b, s] at cu_seqlens, which count over the flattened micro-batch here, and under
context parallelism it expects a zigzag of each document. The boundaries of DocumentAttention would be right for micro-batches of one
sample without context parallelism, and silently give other tokens for labels elsewhere.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer import multi_token_prediction
from torch import Tensor

from .boundaries import Lengths


def roll_within_documents() -> None:
    """Make megatron.core roll a batch with sbhd boundaries as a whole, and put 0 where the next document's first entry would come.

    Every other call goes on as before; installing it again does nothing.

    Raises:
        ValueError: a megatron-core whose `roll_tensor` gets no boundaries (before 0.16).
    """
    stock = multi_token_prediction.roll_tensor
    if hasattr(stock, "within_documents"):
        return
    if "packed_seq_params" not in inspect.signature(stock).parameters:
        raise ValueError(
            "mtp_num_layers: before megatron-core 0.16 multi-token prediction gets no document boundaries, and its targets would be of "
            "other documents. Unset it, or use a newer version"
        )

    @functools.wraps(stock)
    def roll_tensor(
        tensor: Tensor | None,
        shifts: int = -1,
        dims: int = -1,
        cp_group: Any = None,
        packed_seq_params: Any = None,
        **others: Any,
    ) -> tuple[Tensor | None, Tensor | None]:
        """`roll_tensor` of [b, S/cp], of the whole-sequence zigzag under context parallelism."""
        if tensor is None or getattr(packed_seq_params, "qkv_format", None) != "sbhd":
            return stock(tensor, shifts, dims, cp_group, packed_seq_params, **others)
        rolled, _ = stock(tensor, shifts, dims, cp_group, **others)
        rank, cp = (0, 1) if cp_group is None else (cp_group.rank(), cp_group.size())
        cuts = getattr(packed_seq_params, "boundaries", ()) or tuple(packed_seq_params.cu_seqlens_q.tolist())
        rolled = rolled.masked_fill(_last_of_documents(cuts, tensor.size(-1) * cp, rank, cp, tensor.device), 0)
        return rolled, rolled.sum()

    roll_tensor.within_documents = True  # type: ignore[attr-defined]
    multi_token_prediction.roll_tensor = roll_tensor
    if hasattr(gpt_model, "roll_tensor"):  # 0.16 rolls labels there
        gpt_model.roll_tensor = roll_tensor


@functools.lru_cache(maxsize=16)
def _last_of_documents(cuts: Lengths, seq_length: int, rank: int, cp: int, device: torch.device) -> Tensor:
    """bool[b, S/cp], the last position of each document in this rank's part of a micro-batch."""
    last = torch.zeros(cuts[-1], dtype=torch.bool)
    last[torch.tensor(cuts[1:]) - 1] = True
    rows = last.view(-1, seq_length)
    if cp > 1:
        rows = rows.unflatten(1, (2 * cp, -1))[:, [rank, 2 * cp - 1 - rank]].flatten(1)
    return rows.to(device)
