"""What a checkpoint says of the run that saved it (its `state`), and whether another run may go on from it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from omegaconf import OmegaConf

from ..config import ExactConfig
from ..utils.tokenizer import UNKNOWN, Identity
from .schema import RunConfig


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


def read_state(path: Path) -> dict[str, Any]:
    """The `state` of a checkpoint, see `describe`, without its tensors; needs no process group.

    Raises:
        ValueError: it is damaged, or no checkpoint's.
    """
    try:
        return dist_checkpointing.load_common_state_dict(str(path))["state"]
    except Exception as error:  # whatever unpickling makes of other bytes
        where = path / "common.pt" if (path / "common.pt").exists() else path
        raise ValueError(f"{where} cannot be read ({' '.join(str(error).split()) or repr(error)})") from error


def tokenizer_of(state: dict[str, Any]) -> Identity:
    """The tokenizer whose ids a checkpoint's model knows; unknown in those of older versions."""
    return Identity(**state["tokenizer"]) if "tokenizer" in state else UNKNOWN


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
    r"(micro_batch_size|tensor_|pipeline_|virtual_|context_|expert_|sequence_parallel|overlap_p2p|batch_p2p|cp_comm|activations_|fp8"
    r"|moe_token_dispatcher|moe_grouped_gemm|transformer_engine|deterministic|calculate_per|loss_chunk|apply_rope_fusion|cross_entropy_|gradient_accumulation_fusion)"
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
    """`_flatten` of a run's YAML; a setting that a checkpoint's version did not have yet is at its default."""
    given = _flatten(OmegaConf.to_container(OmegaConf.create(config)))
    return {**_flatten(dataclasses.asdict(RunConfig())), **given}


def _listed(changed: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key}: checkpoint {old}, now {new}" for key, (old, new) in changed.items())


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.seed": 1234, ...} of a nested mapping; lists are values."""
    if not isinstance(config, dict) or prefix == "model.data.data_prefix.":
        return {prefix[:-1]: config}
    return {key: value for name, child in config.items() for key, value in _flatten(child, f"{prefix}{name}.").items()}
