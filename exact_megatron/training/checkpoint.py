"""Checkpoints by megatron.core.dist_checkpointing: any layout loads what any other saved.

A run directory holds `checkpoints/step_00000100/`, ... A checkpoint is written to a name that ends in `.partial` and renamed when
every rank has finished, so that a directory without the ending was whole once.

Loading a checkpoint unpickles Python objects, which can run any code: load only what you trust.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from ..config import ExactError
from .checkpoint_files import checkpoints, write_checksums
from .processes import keep_checkpoint_results_in_this_process

# Optimizer state per parameter, as a plain optimizer has it: loads under any tensor, pipeline and data parallel size.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
CONTENT = {"content_metadata": _SHARDING}  # as dist_checkpointing.save stores it
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def _model_state(model: list[Any]) -> dict[str, Any]:
    # A copy for each call: megatron.core writes the process group of the moment into it.
    names = ["model"] if len(model) == 1 else [f"model{i}" for i in range(len(model))]
    return {name: chunk.module.sharded_state_dict(metadata=dict(_SHARDING)) for name, chunk in zip(names, model)}


def save(
    run_dir: str | Path, step: int, model: list[Any], optimizer: Any, scheduler: Any, state: dict[str, Any], keep: int
) -> Path:
    """Write checkpoint `step` on all ranks and remove all but the newest `keep` (-1: none).

    Args:
        state: what `load` returns: step, consumed samples, the run's EXACT settings and digests; plain Python values.

    Raises:
        ExactError: a rank could not write its part, the disk is full for example.
    """
    keep_checkpoint_results_in_this_process()
    final = Path(run_dir, "checkpoints", f"step_{step:08d}")
    partial = final.with_name(final.name + ".partial")
    first = torch.distributed.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it saved
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    gathered_later = [chunk for chunk in model if chunk.ddp_config.overlap_param_gather]
    for chunk in gathered_later:  # the step's new parameters are still to be gathered, by the next forward
        chunk.disable_forward_pre_hook(param_sync=True)
    sharded = _model_state(model)
    sharded["optimizer"] = optimizer.sharded_state_dict(sharded, metadata=dict(_SHARDING))
    sharded["scheduler"] = scheduler.state_dict()
    sharded["state"] = state
    try:
        dist_checkpointing.save(sharded, str(partial), content_metadata=dict(_SHARDING))
        torch.distributed.barrier()
        write_checksums(partial)
    # RuntimeError: torch.save of the small common file
    except (CheckpointException, OSError, RuntimeError) as error:
        failures = getattr(error, "failures", None)  # on the first rank only
        reasons = [error] if failures is None else [cause for cause, _ in failures.values()]
        causes = {" ".join(str(cause).split()) or repr(cause) for cause in reasons}
        kept = checkpoints(run_dir)
        free = shutil.disk_usage(partial).free / 1e9
        raise ExactError(
            f"checkpoint {partial} cannot be written: {'; '.join(sorted(causes)) or 'see the first rank'}. {free:.1f} GB are free there; "
            f"the newest whole checkpoint is {kept[-1] if kept else 'none'}. Free space or quota, then start the same command again"
        ) from error
    for chunk in gathered_later:
        chunk.enable_forward_pre_hook()
    torch.distributed.barrier()
    if first:
        shutil.rmtree(final, ignore_errors=True)  # the same step, saved by a run that was then told to start over
        partial.rename(final)
        if keep > 0:
            for old in checkpoints(run_dir)[
                :-keep
            ]:  # renamed first: a kill must not leave half of one that looks whole
                shutil.rmtree(old.rename(old.with_name(old.name + ".partial")))
    torch.distributed.barrier()
    return final


def _read(sharded: dict[str, Any], path: Path) -> dict[str, Any]:
    """The stored values of `sharded`.

    Raises:
        ExactError: the checkpoint lacks some of them or has them in other shapes, which removing it would not mend; or its files
            cannot be read.
    """
    stored, wanted = stored_entries(path), [v for v in nested_values(sharded) if isinstance(v, ShardedTensor)]
    try:
        return dist_checkpointing.load(sharded, str(path))
    except CheckpointException as error:
        if missing := sorted({tensor.key for tensor in wanted} - stored.keys()):
            raise ExactError(
                f"the checkpoint {path} lacks {len(missing)} tensors of this model: {', '.join(missing[:4])}"
                f"{', ...' if len(missing) > 4 else ''}. Give the model the settings that the checkpoint was saved with"
            ) from error
        shapes = {
            t.key: (tuple(stored[t.key].size), tuple(t.global_shape))
            for t in wanted
            if not t.allow_shape_mismatch and hasattr(stored[t.key], "size")
        }
        if other := [f"{key} is {a} there, {b} here" for key, (a, b) in sorted(shapes.items()) if a != b]:
            raise ExactError(
                f"the checkpoint {path} has tensors of other shapes: {'; '.join(other[:4])}. Give the model the settings that the "
                "checkpoint was saved with"
            ) from error
        causes = {" ".join(str(cause).split()) or repr(cause) for cause, _ in error.failures.values()}
        raise ExactError(
            f"the checkpoint {path} cannot be read: {'; '.join(sorted(causes)) or 'see the first rank'}. If it is damaged (an older "
            "version's has no checksums.json that would tell), remove it: the run then goes on from the one before"
        ) from error


def load(path: Path, model: list[Any], optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Load weights, optimizer and schedule; returns the `state` that was saved.

    With or without Transformer Engine, as `load_weights`.

    Raises:
        ExactError: as `load_weights`, also for a tensor of the optimizer.
    """
    sharded = _stored_state(path, model)
    names = list(sharded)
    sharded["optimizer"] = optimizer.sharded_state_dict(sharded, is_loading=True, metadata=dict(_SHARDING))
    loaded = _read(sharded, path)
    _set_weights(path, model, [loaded[name] for name in names])
    optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    return loaded["state"]


def stored_entries(path: Path) -> dict[str, Any]:
    """What torch's distributed checkpoint holds, by key: tensors have `size` and `properties.dtype`. (megatron.core 0.19's own
    load_tensors_metadata fails on torch 2.15.)"""
    return FileSystemReader(path).read_metadata().state_dict_metadata


def _stored_state(path: Path, model: list[Any]) -> dict[str, Any]:
    """`_model_state` without the extra states of Transformer Engine that were not saved."""
    stored = stored_entries(path)
    return {
        name: {k: v for k, v in state.items() if not isinstance(v, ShardedObject) or v.unique_key in stored}
        for name, state in _model_state(model).items()
    }


def _set_weights(path: Path, model: list[Any], states: list[dict[str, Any]]) -> None:
    for chunk, state in zip(model, states, strict=True):
        missing, unknown = chunk.module.load_state_dict(state, strict=False)
        if weights := [key for key in (*missing, *unknown) if "_extra_state" not in key]:
            raise ExactError(f"{path} and the model do not have the same weights: {', '.join(weights[:4])}")


def load_weights(path: Path, model: list[Any]) -> None:
    """Load the weights of a model with these layers, saved from any layout, with or without Transformer Engine, or converted.

    Rows of the vocabulary that only this layout's padding has become 0. Extra states of Transformer Engine (FP8 scales) that were
    not saved stay as they are.

    Raises:
        ExactError: the checkpoint lacks a weight, has it in another shape, or cannot be read.
    """
    sharded = _stored_state(path, model)
    names = list(sharded)
    loaded = _read(sharded, path)
    _set_weights(path, model, [loaded[name] for name in names])
    rows = stored_entries(path)[_VOCABULARY[0]].size[0]
    for chunk in model:
        for key, parameter in chunk.module.named_parameters():
            if key in _VOCABULARY:
                first = parallel_state.get_tensor_model_parallel_rank() * parameter.shape[0]
                parameter.data[max(0, rows - first) :].zero_()
