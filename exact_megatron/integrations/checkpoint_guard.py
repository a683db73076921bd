"""What every host says of the weights: the table when a run starts, and what changed since its checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..allocation import WeightTable
from ..config import ExactConfig

ANEW = "start anew with checkpoint.finetune=true"

logger = logging.getLogger(__name__)


def table_lines(table: WeightTable) -> list[str]:
    """The weight table as lines of text: window, tau, tail share, and a line for each bucket."""
    head = f"window {table.seq_length}, tau {table.config.tau}, tail {table.tail_share:.1%} of the targets, "
    lines = [f"weights     {head}{table.weighted_tail_share:.1%} of the weight, table {table.digest}"]
    for row in table.rows():
        lines.append(
            f"            {row['low']:>7}-{row['high']:<7} {row['share']:>7.2%} of the targets, weight {row['weight']:.6f}"
        )
    return lines


def refuse_unweighted(before: Mapping[str, Any] | None, config: ExactConfig, anew: str) -> None:
    """Refuse to go on from a checkpoint of a weighted run in a run that does not enable EXACT.

    Args:
        before, anew: as in `check_resumed`.
        config: the run's settings.

    Raises:
        ValueError: it would, and not config.allow_changed_weights.
    """
    if before and not config.enabled and not config.allow_changed_weights:
        raise ValueError(
            "the checkpoint was trained with EXACT's weights, and this run does not enable them: add model.exact.enabled=true, "
            f"{anew}, or go on without weights with model.exact.allow_changed_weights=true"
        )


def check_resumed(before: Mapping[str, Any] | None, now: Mapping[str, Any], config: ExactConfig, anew: str) -> None:
    """Compare the weights of a checkpoint with the run's.

    Args:
        before: the settings, "table" and "census" that the checkpoint holds; None or empty if it was trained without EXACT.
        now: the run's own.
        anew: how this host starts from weights alone, for the message.

    Raises:
        ValueError: they differ, unless config.allow_changed_weights; both values are named.
    """
    if not before or all(before[key] == now[key] for key in ("table", "census")):
        return
    changed = [
        f"{key}: {before.get(key)} in the checkpoint, now {now[key]}" for key in now if before.get(key) != now[key]
    ]
    if not config.allow_changed_weights:
        raise ValueError(
            "the checkpoint was trained with other weights:\n  "
            + "\n  ".join(changed)
            + f"\nUse the settings and data of the checkpoint, {anew}, or accept it with model.exact.allow_changed_weights=true. Another "
            "census alone means that other samples are packed: data, split, seed, or a number of samples that the number of steps or "
            "the batch size changed"
        )
    logger.warning("resumed with other weights: %s", "; ".join(changed))
