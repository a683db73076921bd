"""EXACT as torchtitan's loss: `loss_fn(pred, labels)` is the sum over a batch, which its trainer divides by the supervised tokens of
all ranks.

Its batches do not say whether the last label of a row belongs to the document before it. Without `continues`
this one label of a row has the weight of a document's first token."""

from torch import Tensor
from torch.nn.functional import cross_entropy

from exact_megatron import WeightTable


def exact_loss(pred: Tensor, labels: Tensor, positions: Tensor, table: WeightTable) -> Tensor:
    """pred: [b, S, vocabulary]; labels: [b, S], the next tokens; positions: [b, S], which begin anew with a document."""
    losses = cross_entropy(pred.transpose(1, 2).float(), labels, reduction="none", ignore_index=-100)
    return (table.weights(labels, position_ids=positions) * losses).sum()
