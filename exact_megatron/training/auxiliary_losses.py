"""Losses beside the one of the next token: of a router that shares tokens out unevenly, and of the depths of multi-token prediction.

megatron.core adds their gradients by itself and sums their values up for the log, under names that changed with its versions. Its own
functions for the log average over ranks by an operation that gloo does not have.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from .schema import RunConfig

_ROUTER = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}


def read_auxiliary_losses(run: RunConfig, device: torch.device) -> dict[str, float]:
    """Their means over the micro-batches since the last call, for the log, without coefficients. Call it on all ranks.

    Returns:
        "load_balancing_loss", the mean over the layers (1: all experts get equally many tokens), where its coefficient is not 0.
        "mtp_1 loss", "mtp_2 loss", ... of every depth, weighted: divided by the sum of the weights of a micro-batch's targets on a rank.
    """
    m = run.model
    found: dict[str, torch.Tensor] = {}
    depths = m.mtp_num_layers or 0
    copies = run.data_parallel_size * run.num_microbatches
    if m.num_moe_experts and m.moe_aux_loss_coeff:
        layers = _taken(_router_values(_ROUTER[m.moe_router_load_balancing_type]))  # of this rank's tokens
        found["load_balancing_loss"] = layers.sum() / (m.num_layers + depths) / copies
    if depths:
        tracker = MTPLossLoggingHelper.tracker
        values = _taken(tracker.get("loss_values", tracker.get("values")), depths)
        each = values / (copies * m.tensor_model_parallel_size * m.context_parallel_size)
        found.update({f"mtp_{i + 1} loss": value for i, value in enumerate(each)})
    if not found:
        return {}
    sums = torch.stack([value.to(device) for value in found.values()])
    torch.distributed.all_reduce(sums)
    return dict(zip(found, sums.tolist()))


def forget_auxiliary_losses() -> None:
    """Drop the sums, which have the size of the model that was first trained in this process."""
    MTPLossLoggingHelper.tracker.clear()
    _router_sums().clear()


def _router_sums() -> dict[str, Any]:
    """megatron.core's sums by name, each with `values` float[layers]."""
    if importlib.util.find_spec("megatron.core.transformer.moe.moe_logging") is None:  # before 0.19
        return moe_utils.get_moe_layer_wise_logging_tracker()
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    return get_moe_metrics_tracker().metrics  # type: ignore[no-any-return]


def _router_values(name: str) -> torch.Tensor | None:
    entry = _router_sums().get(name)
    return entry["values"] if isinstance(entry, dict) else getattr(entry, "values", None)


def _taken(values: torch.Tensor | None, size: int = 1) -> torch.Tensor:
    """The values, which are 0 afterwards."""
    if values is None:  # of another stage
        return torch.zeros(size)
    taken = values.clone()
    values.zero_()
    return taken
