"""Reading and checking the native runner's configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from ..config import unknown_key
from .fp8 import misaligned
from .schema import ModelConfig, OptimConfig, RopeScalingConfig, RunConfig  # noqa: F401, other modules take them from here

ConfigPath = Union[str, Path, Sequence[Union[str, Path]], None]  # noqa: UP007, read by Python 3.10 too


def load_config(path: ConfigPath, overrides: list[str] | None = None) -> RunConfig:
    """Read YAML files and `key=value` overrides, and check everything that can be checked without a GPU or data.

    Args:
        path: YAML file; several, of which a later one wins key by key (a list replaces a list); or None for the defaults.
        overrides: `model.exact.enabled=true` and the like; a leading + or ++ (Hydra) is accepted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown key (named with the nearest known one), a value of the wrong kind, or settings that do not fit
            together.
    """
    schema = OmegaConf.structured(RunConfig)
    known = sorted(_keys(schema))
    overrides = [o.lstrip("+") for o in overrides or []]
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"expected key=value, got {override!r}")
    paths = config_paths(path)
    where = ", ".join(paths)
    try:
        given = OmegaConf.create()
        for file in paths:
            layer = OmegaConf.load(file)
            if not isinstance(layer, DictConfig):
                raise ValueError(f"{file} holds a list, not keys and values")
            given = cast(DictConfig, OmegaConf.merge(given, layer))
        for override in overrides:
            key = override.partition("=")[0]
            value = OmegaConf.select(OmegaConf.from_dotlist([override]), key)
            OmegaConf.update(given, key, value, merge=False)  # a list or mapping replaces the file's
        for key in _keys(given):
            if key not in known:
                leaves = [k for k in known if not any(other.startswith(k + ".") for other in known)]
                raise ValueError(unknown_key(str(key), leaves))
        config = OmegaConf.to_object(OmegaConf.merge(schema, given))
    except YAMLError as error:
        raise ValueError(f"{where} or an override is not YAML: {' '.join(str(error).split())}") from error
    except ConfigKeyError as error:
        raise ValueError(f"{where}: {error}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or where}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, RunConfig)
    check(config)
    return config


def config_paths(path: ConfigPath) -> list[str]:
    """The files of `load_config`, in order."""
    if path is None:
        return []
    return [str(path)] if isinstance(path, (str, Path)) else [str(p) for p in path]


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for name in config:
        key = prefix + str(name)
        keys.append(key)
        child = config._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and key != "model.data.data_prefix":
            keys += _keys(child, key + ".")
    return keys


def check(config: RunConfig) -> None:
    """Refuse settings that do not fit together.

    Raises:
        ValueError: names the keys, their values and what to change.
    """
    m, t, data = config.model, config.trainer, config.model.data

    def refuse(problem: str) -> None:
        raise ValueError(problem)

    def one_of(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
        if value not in allowed:
            refuse(f"{key}={value!r} is not one of {', '.join(map(str, allowed))}")

    one_of("trainer.accelerator", t.accelerator, ("auto", "gpu", "cpu"))
    one_of("trainer.precision", t.precision, ("32", "bf16"))
    one_of("model.normalization", m.normalization, ("rmsnorm", "layernorm"))
    one_of("model.activation", m.activation, ("fast-swiglu", "gelu"))
    one_of("model.rope_scaling.rope_type", m.rope_scaling.rope_type, ("default", "llama3"))
    one_of("model.fp8_recipe", m.fp8_recipe, ("delayed", "tensorwise", "blockwise"))
    one_of("model.cross_entropy_fusion_impl", m.cross_entropy_fusion_impl, ("native", "te"))
    one_of(
        "model.optim.name", m.optim.name, ("mcore_distributed_optim", "distributed_fused_adam", "adam", "fused_adam")
    )
    one_of("model.optim.sched.name", m.optim.sched.name, ("CosineAnnealing", "WSD", "constant"))
    one_of(
        "model.activations_checkpoint_granularity", m.activations_checkpoint_granularity, (None, "selective", "full")
    )
    one_of("model.activations_checkpoint_method", m.activations_checkpoint_method, (None, "uniform", "block"))
    for key, value in (
        ("trainer.devices", t.devices),
        ("trainer.num_nodes", t.num_nodes),
        ("trainer.max_steps", t.max_steps),
        ("trainer.log_every_n_steps", t.log_every_n_steps),
        ("model.micro_batch_size", m.micro_batch_size),
        ("model.global_batch_size", m.global_batch_size),
        ("model.tensor_model_parallel_size", m.tensor_model_parallel_size),
        ("model.pipeline_model_parallel_size", m.pipeline_model_parallel_size),
        ("model.context_parallel_size", m.context_parallel_size),
        ("model.num_layers", m.num_layers),
        ("model.hidden_size", m.hidden_size),
        ("model.num_attention_heads", m.num_attention_heads),
        ("model.num_query_groups", m.num_query_groups or 1),
        ("model.kv_channels", 1 if m.kv_channels is None else m.kv_channels),
        ("model.data.seq_length", data.seq_length),
    ):
        if value < 1:
            refuse(f"{key}={value} must be at least 1")

    tp, pp, cp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size, m.context_parallel_size
    vpp = m.virtual_pipeline_model_parallel_size
    if config.world_size % (tp * pp * cp):
        refuse(
            f"{config.world_size} ranks (trainer.devices={t.devices} x trainer.num_nodes={t.num_nodes}) cannot be divided into groups "
            f"of tensor {tp} x pipeline {pp} x context {cp} = {tp * pp * cp}: change one of these sizes"
        )
    group = m.micro_batch_size * config.data_parallel_size
    if m.global_batch_size % group:
        refuse(
            f"model.global_batch_size={m.global_batch_size} must be a multiple of model.micro_batch_size={m.micro_batch_size} x "
            f"{config.data_parallel_size} data-parallel ranks = {group}"
        )
    for key, heads in (("num_attention_heads", m.num_attention_heads), ("num_query_groups", m.num_query_groups)):
        if heads is not None and heads % tp:
            refuse(f"model.{key}={heads} must be a multiple of model.tensor_model_parallel_size={tp}")
    if m.num_query_groups is not None and m.num_attention_heads % m.num_query_groups:
        refuse(
            f"model.num_attention_heads={m.num_attention_heads} must be a multiple of num_query_groups={m.num_query_groups}"
        )
    if m.num_layers % (pp * (vpp or 1)):
        refuse(f"model.num_layers={m.num_layers} must be a multiple of the {pp * (vpp or 1)} (virtual) pipeline stages")
    if vpp is not None and pp == 1:
        refuse(f"model.virtual_pipeline_model_parallel_size={vpp} needs model.pipeline_model_parallel_size > 1")
    if vpp is not None and config.num_microbatches % pp:
        refuse(
            f"virtual pipeline stages need a number of micro-batches ({config.num_microbatches}) that is a multiple of {pp} stages"
        )
    if vpp is not None and m.batch_p2p_comm:
        refuse(
            "model.batch_p2p_comm=true with virtual pipeline stages gives wrong gradients without an error (megatron-core 0.16 "
            "and 0.19 on gloo): leave it out, or set model.overlap_p2p_comm=true and model.batch_p2p_comm=false"
        )
    if cp > 1 and data.seq_length % (2 * cp):
        refuse(
            f"model.data.seq_length={data.seq_length} must be a multiple of 2 x model.context_parallel_size = {2 * cp}"
        )
    if data.seq_length > (longest := m.max_position_embeddings or data.seq_length):
        refuse(
            f"model.data.seq_length={data.seq_length} is above model.max_position_embeddings={longest}: raise it, and extend the window "
            "with model.rotary_base, model.rope_scaling or model.seq_len_interpolation_factor"
        )
    if m.rope_scaling.rope_type != "default" and m.seq_len_interpolation_factor is not None:
        refuse("model.rope_scaling and model.seq_len_interpolation_factor both scale the positions: choose one")
    if m.sequence_parallel and (data.seq_length // cp) % tp:
        refuse(
            f"sequence parallelism needs the {data.seq_length // cp} tokens of a context-parallel rank to be a multiple of "
            f"model.tensor_model_parallel_size={tp}"
        )
    if m.cp_comm_type not in (None, "a2a", "all_gather"):
        refuse(
            f"model.cp_comm_type={m.cp_comm_type!r} is not one of a2a, all_gather, the exchanges that documents are attended with; "
            "leave it out to have one of them chosen"
        )
    kv_heads = (m.num_query_groups or m.num_attention_heads) // tp
    if m.cp_comm_type == "a2a" and kv_heads % cp:
        refuse(
            f"model.cp_comm_type=a2a shares heads among context-parallel ranks, and the {kv_heads} KV heads of a tensor-parallel rank do "
            f"not divide by model.context_parallel_size={cp}: use all_gather, or leave it out"
        )
    if m.loss_chunk_tokens < 0 or (m.loss_chunk_tokens and m.sequence_parallel and tp > 1):
        refuse(
            f"model.loss_chunk_tokens={m.loss_chunk_tokens} must be 0 or a number of positions, and needs model.sequence_parallel=false"
        )
    if m.cross_entropy_fusion_impl == "te" and not m.cross_entropy_loss_fusion:
        refuse(
            "model.cross_entropy_fusion_impl=te needs model.cross_entropy_loss_fusion=true, which turns the fusion on"
        )
    if m.cross_entropy_fusion_impl == "te" and m.loss_chunk_tokens:
        refuse(
            f"model.cross_entropy_fusion_impl=te takes all logits at once, model.loss_chunk_tokens={m.loss_chunk_tokens} some of them: "
            "choose one (chunks work with the native fusion)"
        )
    if m.deterministic_mode and m.cross_entropy_loss_fusion:
        refuse(
            "model.deterministic_mode=true with model.cross_entropy_loss_fusion=true: Megatron-LM allows no fused cross entropy in "
            "deterministic mode, set model.cross_entropy_loss_fusion=false"
        )
    if m.fp8 and (found := misaligned(config)):
        refuse("model.fp8=true with sizes that FP8 products do not take:\n  " + "\n  ".join(found))
    if m.attention_dropout:
        refuse(f"model.attention_dropout={m.attention_dropout}: the attention over documents has none, set it to 0.0")
    if m.mtp_num_layers:
        refuse(
            f"model.mtp_num_layers={m.mtp_num_layers}: multi-token prediction rolls loss_mask with the labels, so that the weights would "
            "be used at the wrong depth; the native runner does not train it"
        )
    if m.exact.enabled and not data.document_masking and not m.exact.allow_unmasked_documents:
        refuse(
            "model.exact.enabled=true with model.data.document_masking=false: targets would be weighted by a context that is not what "
            "they see. Mask documents, or ask for it with model.exact.allow_unmasked_documents=true"
        )
    if m.exact.enabled:
        m.exact.validated(data.seq_length)
    if not m.calculate_per_token_loss and cp > 1 and data.eod_mask_loss:
        refuse(
            "model.calculate_per_token_loss=false with model.context_parallel_size > 1 and model.data.eod_mask_loss=true "
            "averages over context-parallel ranks that supervise different numbers of targets: use model.calculate_per_token_loss=true"
        )
    if m.activations_checkpoint_granularity == "full" and m.activations_checkpoint_method is None:
        refuse(
            "model.activations_checkpoint_granularity=full needs model.activations_checkpoint_method=uniform or block"
        )
    if (m.activations_checkpoint_granularity == "full") != (m.activations_checkpoint_num_layers is not None):
        refuse(
            f"model.activations_checkpoint_num_layers={m.activations_checkpoint_num_layers} with model.activations_checkpoint_granularity="
            f"{m.activations_checkpoint_granularity}: full recomputation needs a number of layers, anything else takes none"
        )
    if m.optim.overlap_param_sync and not (m.optim.distributed and m.optim.overlap_grad_sync):
        refuse("model.optim.overlap_param_sync needs a distributed optimizer and model.optim.overlap_grad_sync=true")
    if m.optim.sched.warmup_steps >= t.max_steps and m.optim.sched.warmup_steps:
        refuse(
            f"model.optim.sched.warmup_steps={m.optim.sched.warmup_steps} must be below trainer.max_steps={t.max_steps}"
        )
    if m.optim.sched.name == "WSD" and not 0 < m.optim.sched.wsd_decay_steps <= t.max_steps:
        refuse(
            f"a WSD schedule needs model.optim.sched.wsd_decay_steps in 1..{t.max_steps}, not {m.optim.sched.wsd_decay_steps}"
        )
    if m.optim.sched.min_lr > m.optim.lr:
        refuse(f"model.optim.sched.min_lr={m.optim.sched.min_lr} is above model.optim.lr={m.optim.lr}")
    if not re.fullmatch(r"\s*[0-9.]+(\s*[,/]\s*[0-9.]+){0,2}\s*", data.splits_string):
        refuse(f"model.data.splits_string={data.splits_string!r} is not up to three shares, for example 99,1,0")
    if not data.data_prefix:
        refuse("model.data.data_prefix is empty: give the prefix of a .bin/.idx pair (see `exact-megatron prepare`)")


def parse_blend(entries: Any) -> tuple[list[str], list[float] | None]:
    """Read PREFIX, [prefix, ...] or [weight, prefix, weight, prefix, ...] as NeMo and Megatron-LM do.

    Raises:
        ValueError: a weight that is not above 0.
    """
    entries = [str(e) for e in (entries if isinstance(entries, list) else [entries])]
    number = re.compile(r"[0-9]*\.?[0-9]+(e-?[0-9]+)?$")
    if len(entries) > 1 and len(entries) % 2 == 0 and all(number.match(e) for e in entries[::2]):
        weights = [float(e) for e in entries[::2]]
        if min(weights) <= 0:
            raise ValueError(
                f"model.data.data_prefix gives {entries[1::2]} the weights {weights}: each must be above 0"
            )
        return entries[1::2], weights
    return entries, None
