"""EXACT in a plain PyTorch loop."""

from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy

from exact_megatron import WeightTable


def loss_of(model: Module, batch: dict[str, Tensor], table: WeightTable) -> Tensor:
    """batch: input_ids and labels [b, S], the labels being the next tokens (-100: not supervised); cu_seqlens [documents + 1];
    continues bool [b]: a row's last label is a token of its last document."""
    losses = cross_entropy(model(batch["input_ids"]).transpose(1, 2).float(), batch["labels"], reduction="none")
    weights = table.weights(batch["labels"], cu_seqlens=batch["cu_seqlens"], continues=batch["continues"])
    return (weights * losses).sum() / (batch["labels"] != -100).sum()
