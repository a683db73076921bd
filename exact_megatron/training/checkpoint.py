"""Checkpoints by megatron.core.dist_checkpointing: any layout loads what any other saved.

A run directory holds `checkpoints/step_00000100/`, ... A checkpoint is written to a name that ends in `.partial` and renamed when
every rank has finished, so that a directory without the ending was whole once. `checksums.json` in it says what was written: size and
CRC-32 of every file, by which later damage is found.

Loading a checkpoint unpickles Python objects, which can run any code: load only what you trust.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from omegaconf import OmegaConf
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from ..config import ExactConfig, ExactError
from ..utils.tokenizer import UNKNOWN, Identity
from .processes import end_checkpoint_queue_with_this_process
from .schema import RunConfig

_STEP = re.compile(r"step_(\d+)$")
# Optimizer state per parameter, as a plain optimizer has it: loads under any tensor, pipeline and data parallel size.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
CONTENT = {"content_metadata": _SHARDING}  # as dist_checkpointing.save stores it
CHECKSUMS = "checksums.json"
_ALWAYS = (".metadata", "common.pt", "metadata.json")  # files of every checkpoint
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = Path(run_dir, "checkpoints").glob("step_*")
    return sorted((p for p in found if _STEP.fullmatch(p.name)), key=lambda p: int(p.name.split("_")[1]))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at `path`: itself, or the newest of a run directory.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if _STEP.fullmatch(path.name) and (path / "metadata.json").is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise FileNotFoundError(
            f"no checkpoint at {path}: give a run directory with checkpoints/step_N, or such a folder itself"
        )
    return found[-1]


def _checksum(path: Path) -> tuple[int, str]:
    """Size in bytes and CRC-32 (hexadecimal) of a file."""
    size = 0
    crc = 0
    block = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            crc = zlib.crc32(memoryview(block)[:count], crc)
            size += count
    return size, f"{crc:08x}"


def _checksums(paths: list[Path]) -> dict[str, tuple[int, str]]:
    with ThreadPoolExecutor(4) as threads:  # zlib releases the GIL
        return dict(zip([path.name for path in paths], threads.map(_checksum, paths)))


def write_checksums(path: Path) -> None:
    """Write `checksums.json` for the files of a new checkpoint. Call it on all ranks: each reads what it wrote, from its page cache."""
    ranks = _ranks()
    writer = re.compile(r"__(\d+)_\d+\.distcp")
    # A rank lists a folder of a shared file system late: what others wrote is theirs.
    owners = {f: int(match[1]) if (match := writer.fullmatch(f.name)) else 0 for f in path.iterdir()}
    mine = [f for f, owner in owners.items() if owner == ranks[0] and f.name != CHECKSUMS]
    parts = _gathered(_checksums(sorted(mine)))
    if ranks[0] == 0:
        files = dict(sorted(entry for part in parts for entry in part.items()))
        (path / CHECKSUMS).write_text(json.dumps({"algorithm": "crc32", "files": files}, indent=1) + "\n")


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, by its checksums.json; None: nothing.

    Of a checkpoint without that file (an older version's) only the names are known. Call it on all ranks: each reads a share.
    """
    return next(filter(None, _gathered(_damage_of_share(path, *_ranks()))), None)


def _damage_of_share(path: Path, rank: int, world: int) -> str | None:
    for name in _ALWAYS:
        if not (path / name).is_file():
            return f"{path / name} is missing"
    if not (path / CHECKSUMS).is_file():
        return None
    try:
        files = json.loads((path / CHECKSUMS).read_text())["files"]
        known = {str(name): (int(size), str(crc)) for name, (size, crc) in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path / CHECKSUMS} is not what was written"
    if unlisted := set(_ALWAYS) - known.keys():
        return f"{path / CHECKSUMS} does not list {', '.join(sorted(unlisted))}"
    for name, (size, _) in sorted(known.items()):  # the quick look first
        if not (path / name).is_file():
            return f"{path / name} is missing"
        if (path / name).stat().st_size != size:
            return f"{path / name} has {(path / name).stat().st_size} bytes, {size} were written"
    share = sorted(known, key=lambda name: known[name])[rank::world]
    found = _checksums([path / name for name in share])
    return next(
        (f"{path / name} holds other bytes than were written" for name in share if found[name] != known[name]), None
    )


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that it is none: step_N.damaged."""
    aside = path.with_name(path.name + ".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def refuse_damaged(path: Path) -> None:
    """Raise ValueError for a checkpoint that is not whole, with the newest older one that is. Call it on all ranks."""
    if problem := damage(path):
        others = [p for p in reversed(checkpoints(path.parent.parent)) if p != path]
        whole = next((p for p in others if damage(p) is None), None)
        raise ValueError(
            f"the checkpoint {path} is damaged: {problem}. "
            + (
                f"{whole} is whole: name that one"
                if whole
                else "No other checkpoint beside it is whole: fetch or make it again"
            )
        )


def newest_whole(run_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint of a run (None: there is no checkpoint), and the damage of those after it. Call it on all ranks.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints(run_dir)):
        problem = damage(path)
        if problem is None:
            return path, damaged
        damaged[path] = problem
    if damaged:
        raise ValueError(
            f"no checkpoint of {run_dir} is whole: {'; '.join(damaged.values())}. Put a whole one there, or remove "
            f"{', '.join(map(str, damaged))} to start anew"
        )
    return None, damaged


def _ranks() -> tuple[int, int]:
    """This rank and their number; (0, 1) without a process group."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _gathered(value: Any) -> list[Any]:
    """The values of all ranks, on each."""
    values = [value] * _ranks()[1]
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


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
    end_checkpoint_queue_with_this_process()
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


def read_state(path: Path) -> dict[str, Any]:
    """The `state` of a checkpoint, see `describe`, without its tensors; needs no process group.

    Raises:
        ValueError: common.pt is damaged, or no checkpoint's.
    """
    try:
        return dist_checkpointing.load_common_state_dict(str(path))["state"]
    except Exception as error:  # whatever unpickling makes of other bytes
        raise ValueError(
            f"{path / 'common.pt'} cannot be read ({' '.join(str(error).split()) or repr(error)})"
        ) from error


def tokenizer_of(state: dict[str, Any]) -> Identity:
    """The tokenizer whose ids a checkpoint's model knows; unknown in those of older versions."""
    return Identity(**state["tokenizer"]) if "tokenizer" in state else UNKNOWN


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


# Settings that give the same tensors another meaning; positions alone may be another, to extend the window.
_MEANING = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "bias"),
    *("qkv_bias", "qk_layernorm", "normalization", "layernorm_epsilon", "activation", "rotary_percentage"),
    *(
        "share_embeddings_and_output_weights",
        "num_moe_experts",
        "moe_router_topk",
        "moe_ffn_hidden_size",
        "mtp_num_layers",
    ),
)


def refuse_other_model(state: dict[str, Any], run: RunConfig, vocab_size: int | None) -> list[str]:
    """Compare the model of a checkpoint to the one that is to start from its weights.

    Args:
        vocab_size: of the run, without padding; None: not known, and not compared.

    Returns:
        Settings of positions (RoPE) that are another now, for the user to read.

    Raises:
        ValueError: other layers or another vocabulary; loaded all the same, they would compute something else.
    """
    saved = _settings(state["config"])
    before: dict[str, Any] = {key: saved.get(f"model.{key}") for key in _MEANING}
    now: dict[str, Any] = {key: getattr(run.model, key) for key in _MEANING}
    for settings in (before, now):
        settings["num_query_groups"] = settings["num_query_groups"] or settings["num_attention_heads"]
        settings["kv_channels"] = settings["kv_channels"] or settings["hidden_size"] // settings["num_attention_heads"]
        settings["moe_ffn_hidden_size"] = settings["moe_ffn_hidden_size"] or settings["ffn_hidden_size"]
        settings["mtp_num_layers"] = settings["mtp_num_layers"] or 0
    if vocab_size is not None:
        before["override_vocab_size"] = state.get("vocab_size", vocab_size)
        now["override_vocab_size"] = vocab_size
    changed = {f"model.{key}": (before[key], now[key]) for key in now if before[key] != now[key]}
    if changed:
        raise ValueError(f"restore_from_path={run.restore_from_path} holds another model ({_listed(changed)})")
    positions = _settings(run.to_yaml())
    return [
        f"{key}: {saved[key]} there, now {value}"
        for key, value in positions.items()
        if key.startswith(("model.rotary_base", "model.rope_scaling", "model.seq_len_interpolation_factor"))
        and saved.get(key, value) != value
    ]


# What may be another after a resume: where and how long the run trains, its layout and the optimizer's schedule.
_FREE = re.compile(
    r"trainer\.|exp_manager\.|restore_from_path|model\.(optim|exact|qk_timing)\.|model\.data\.(num_workers|index_mapping_dir|accept_other)|model\."
    r"(micro_batch_size|tensor_|pipeline_|virtual_|context_|expert_|moe_token_dispatcher|moe_grouped_gemm|sequence_parallel|overlap_p2p|batch_p2p|cp_comm|activations_|fp8"
    r"|transformer_engine|deterministic|calculate_per|loss_chunk|apply_rope_fusion|cross_entropy_|gradient_accumulation_fusion)"
)


def refuse_changed_run(state: dict[str, Any], run: RunConfig, digests: Mapping[str, str | None]) -> None:
    """Compare what a checkpoint was trained with to what the run would go on with.

    Args:
        digests: {"census": ..., "weights": ...} of the run, see `describe`; what is not in it is not compared.

    Raises:
        ValueError: other data, seed, window, batch size or model; or other EXACT settings or another census, unless
            model.exact.allow_changed_weights.
    """
    before, after = _settings(state["config"]), _settings(run.to_yaml())
    changed = {k: (before.get(k), v) for k, v in after.items() if before.get(k) != v and not _FREE.match(k)}
    if changed:
        raise ValueError(
            f"the checkpoint was trained with other settings ({_listed(changed)}): the data would come in another order, or the "
            "model would be another. Put them back, or start a new stage from its weights with restore_from_path"
        )
    experts = "model.expert_model_parallel_size"
    if (before[experts] > 1) != (after[experts] > 1):
        raise ValueError(
            f"{experts} is {before[experts]} in the checkpoint and now {after[experts]}: megatron.core stores the optimizer's state of "
            "experts apart where they are shared out, and cannot go from one to the other. Put it back, or start a new stage from the "
            "weights with restore_from_path"
        )
    changed = {
        key: (state["exact"].get(key), value)
        for key, value in run.model.exact.to_dict().items()
        if key not in ("log_buckets", "allow_changed_weights", "allow_unmasked_documents")
        and state["exact"].get(key) != value
    }
    changed.update({key: (state[key], value) for key, value in digests.items() if state[key] != value})
    if changed and not run.model.exact.allow_changed_weights:
        steps = (before["trainer.max_steps"], after["trainer.max_steps"])
        longer = (
            f" trainer.max_steps went from {steps[0]} to {steps[1]}, so that other samples are packed."
            if steps[0] != steps[1]
            else ""
        )
        raise ValueError(
            f"the checkpoint was trained with other EXACT weights ({_listed(changed)}).{longer} Put the settings or the data back, or "
            "accept the change with model.exact.allow_changed_weights=true"
        )


def _settings(config: str) -> dict[str, Any]:
    """`flatten` of a run's YAML; a setting that a checkpoint's version did not have yet is at its default."""
    given = flatten(OmegaConf.to_container(OmegaConf.create(config)))
    return {**flatten(dataclasses.asdict(RunConfig())), **given}


def _listed(changed: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key}: checkpoint {old}, now {new}" for key, (old, new) in changed.items())


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.seed": 1234, ...} of a nested mapping; lists are values."""
    if not isinstance(config, dict) or prefix == "model.data.data_prefix.":
        return {prefix[:-1]: config}
    return {key: value for name, child in config.items() for key, value in flatten(child, f"{prefix}{name}.").items()}


def describe(
    run: RunConfig, step: int, vocab_size: int, census: str | None, weights: str | None, tokenizer: Identity = UNKNOWN
) -> dict[str, Any]:
    """The `state` of a checkpoint. `vocab_size` is without this layout's padding."""
    exact: ExactConfig = run.model.exact
    return {
        "step": step,
        "consumed_samples": step * run.model.global_batch_size,
        "global_batch_size": run.model.global_batch_size,
        "seq_length": run.model.data.seq_length,
        "vocab_size": vocab_size,
        "exact": exact.to_dict(),
        "census": census,
        "weights": weights,
        "tokenizer": tokenizer._asdict(),
        "config": run.to_yaml(),
    }
