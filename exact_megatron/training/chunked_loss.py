"""Logits and cross entropy a chunk of the sequence at a time, so that the logits of a long window never exist at once.

With LLaMA-3's vocabulary the logits of 32,768 tokens are 16.8 GB in float32, beside their bf16 form and gradients. Here a chunk's
logits are made, turned into losses and dropped, and made again in backward: one more product with the output matrix, a third
more work in this part of the step. The losses stay per token, so weights of any kind go on working, with megatron.core's own
(vocabulary-parallel) layers and cross entropy.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def chunk_loss(model: Any, tokens: int) -> None:
    """Make a GPTModel of the last pipeline stage compute its losses `tokens` positions of each sample at a time.

    `output_layer` hands its input on, and `compute_language_model_loss` (megatron.core 0.16 to 0.19:
    models/common/language_module/language_module.py) takes it in chunks. The model then gives losses, never logits.

    Raises:
        ValueError: sequence parallelism, whose gather over ranks would put the chunks in another order; MuP, which scales logits.
    """
    config = model.config
    if config.sequence_parallel or getattr(config, "use_mup", False):
        raise ValueError(
            f"model.loss_chunk_tokens={tokens} needs model.sequence_parallel=false (and no MuP): the chunks are of the whole sequence"
        )
    logits_of = model.output_layer.forward
    losses_of = model.compute_language_model_loss
    weights: list[Any] = []

    def defer(hidden: torch.Tensor, weight: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
        weights[:] = [weight]  # of the tied embedding, or None
        return hidden, None

    def chunk(weight: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return losses_of(labels, logits_of(hidden, weight=weight)[0])

    def losses(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """[b, s] labels and [s, b, h] hidden states -> [b, s] losses."""
        parts = zip(logits.split(tokens), labels.split(tokens, dim=1))
        one = partial(chunk, weights[0])
        made = [checkpoint(one, h, y, use_reentrant=False, preserve_rng_state=False) for h, y in parts]
        return torch.cat(made, dim=1)

    model.output_layer.forward = defer
    model.compute_language_model_loss = losses
