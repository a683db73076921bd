"""What a run really needed: memory.json in the run's folder, for `exact-megatron plan --measured`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from ..utils.files import write_text


def record_memory(
    path: Path, step: int, vocab_size: int, model: list[Any], optimizer: Any, device: torch.device
) -> None:
    """Gather `rank_memory` of all ranks and write it on the first. Call it on all ranks, after an optimizer step."""
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, rank_memory(model, optimizer, device))
    if torch.distributed.get_rank() == 0:
        write_text(path, json.dumps({"step": step, "vocab_size": vocab_size, "ranks": ranks}, indent=1) + "\n")


def rank_memory(model: list[Any], optimizer: Any, device: torch.device) -> dict[str, Any]:
    """Bytes of this rank: weights, gradients and optimizer as their tensors' storages say (each storage once), and on a GPU
    the peaks of torch's allocator since the start (None on a CPU) and what all processes use of the device (context and NCCL too)."""
    weights = _storages(p for chunk in model for p in chunk.module.parameters())
    gradients = _storages(b.grad_data for chunk in model for b in chunk.buffers)
    states: list[torch.Tensor] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        states += [p for group in inner.param_groups for p in group["params"]]
        states += [v for state in inner.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    optimizer = {k: n for k, n in _storages(states).items() if k not in weights}
    record: dict[str, Any] = {
        "rank": torch.distributed.get_rank(),
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "parameters": sum(p.numel() for chunk in model for p in chunk.module.parameters()),
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(optimizer.values()),
        "peak_allocated": None,
        "peak_reserved": None,
        "device_used": None,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        record["peak_allocated"] = torch.cuda.max_memory_allocated()
        record["peak_reserved"] = torch.cuda.max_memory_reserved()
        record["device_used"] = total - free
    return record


def _storages(tensors: Any) -> dict[int, int]:
    """{address: bytes} of the storages behind the tensors."""
    found = (t.untyped_storage() for t in tensors)
    return {s.data_ptr(): s.nbytes() for s in found}
