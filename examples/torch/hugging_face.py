"""EXACT in Hugging Face's Trainer, or TRL's SFTTrainer with packing=True.

Their collators give position_ids that begin anew with a document."""

from typing import Any

from torch.nn.functional import cross_entropy
from transformers import Trainer

from exact_megatron import WeightTable


class ExactTrainer(Trainer):
    """Trainer(..., with `table` set before train())."""

    table: WeightTable

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")  # or the model computes its own loss
        outputs = model(**inputs)
        losses = cross_entropy(outputs.logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")
        weights = self.table.weights(labels, position_ids=inputs["position_ids"], shifted=False)[:, 1:]
        count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = (weights * losses).sum() / count
        return (loss, outputs) if return_outputs else loss
