"""Looks at a run that is not started: what each raises, and what the weights of its data would be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...allocation import WeightTable
from ...blend import stored_order
from ...config import ExactConfig, ExactError
from ...exposure import ExposureCensus
from ...packing import read_index
from ...utils import extras


def problems(*looks: Callable[[], Any]) -> list[str]:
    """What each look raises, in words."""
    found = []
    for look in looks:
        try:
            look()
        except ImportError as error:
            found.append(extras.remedy(error) or f"{error}: pip install 'exact-megatron[all]'")
        except (ValueError, OSError, ExactError) as error:
            found.append(str(error))
    return found


def effect(
    exact: ExactConfig,
    seq_length: int | None,
    prefixes: Callable[[], list[str]],
    masking: str,
    eod: bool,
    refused: list[str],
) -> dict[str, Any]:
    """Window, tau and tail share of data in stored order, once; the run itself counts its own stream, blend and epochs."""
    found: dict[str, Any] = {"enabled": exact.enabled, "documents": masking, "window": seq_length}

    def count() -> None:
        assert seq_length is not None
        config = exact.validated(seq_length)
        found.update(tau=config.tau, alpha=config.alpha, gamma=config.gamma)
        indices = [read_index(prefix) for prefix in prefixes()]
        parts = [
            ExposureCensus.from_document_lengths(
                i.lengths, seq_length, document_index=stored_order(i.lengths, seq_length), eod_mask_loss=eod
            )
            for i in indices
        ]
        if parts:
            table = WeightTable.from_census(sum(parts[1:], parts[0]), config)
            found.update(tail_share=table.tail_share, weighted_tail_share=table.weighted_tail_share, data=len(indices))

    uncounted = problems(count) if seq_length is not None else []
    known = {line for reason in refused for line in reason.splitlines()}
    return found | {"refused": refused + [p for p in uncounted if exact.enabled and p not in known]}
