"""Configuration of the native runner, with NeMo's key names (trainer.*, model.*, exp_manager.*)."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from ..config import ExactConfig, unknown_key

# Optional[...] instead of `| None`: omegaconf reads these annotations on Python 3.10 too.
# ruff: noqa: UP045


@dataclass
class TrainerConfig:
    devices: int = 1  # ranks on a node
    num_nodes: int = 1
    accelerator: str = "auto"  # auto | gpu | cpu
    precision: str = "32"  # 32 | bf16
    max_steps: int = 1000
    val_check_interval: int = 0  # steps between validations; 0: only at the end
    limit_val_batches: int = 0  # global batches a validation; 0: no validation
    log_every_n_steps: int = 1  # steps between log lines; metrics.jsonl has every step
    gradient_clip_val: float = 1.0  # 0: no clipping


@dataclass
class CheckpointCallbackParams:
    every_n_train_steps: int = 0  # 0: only at the end and at a stop signal
    save_top_k: int = 2  # newest checkpoints kept; -1: all
    save_last: bool = True  # at the end


@dataclass
class ExpManagerConfig:
    exp_dir: str = "runs/run"
    resume_if_exists: bool = True
    create_tensorboard_logger: bool = True
    checkpoint_callback_params: CheckpointCallbackParams = field(default_factory=CheckpointCallbackParams)


@dataclass
class DataConfig:
    # [prefix], [weight, prefix, weight, prefix, ...], or {train: [...], validation: [...], test: [...]}
    data_prefix: Any = None
    splits_string: str = "99,1,0"  # used when data_prefix is one list for all splits
    index_mapping_dir: Optional[str] = None  # Megatron's index caches and the census; None: beside the data
    seq_length: int = 4096
    num_workers: int = 2  # loader processes a rank; 0: in the rank itself
    eod_mask_loss: bool = False
    document_masking: bool = True  # a target sees its own document only
    eod_id: Optional[int] = None  # None: from PREFIX.json, as `exact-megatron prepare` writes it


@dataclass
class SchedConfig:
    name: str = "CosineAnnealing"  # CosineAnnealing | WSD | constant
    warmup_steps: int = 0
    min_lr: float = 0.0
    wsd_decay_steps: int = 0  # length of the decay at the end of a WSD schedule


@dataclass
class OptimConfig:
    name: str = "mcore_distributed_optim"  # mcore_distributed_optim | distributed_fused_adam | adam | fused_adam
    lr: float = 3e-4
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    overlap_grad_sync: bool = False
    overlap_param_sync: bool = False
    bucket_cap_mb: int = 0  # 0: Megatron's own choice
    sched: SchedConfig = field(default_factory=SchedConfig)

    @property
    def distributed(self) -> bool:
        return self.name in ("mcore_distributed_optim", "distributed_fused_adam")


@dataclass
class ModelConfig:
    micro_batch_size: int = 1
    global_batch_size: int = 8
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: Optional[int] = None
    context_parallel_size: int = 1
    cp_comm_type: Optional[str] = None  # a2a | all_gather; None: a2a where the KV heads allow it
    sequence_parallel: bool = False  # without effect at tensor_model_parallel_size=1
    overlap_p2p_comm: Optional[bool] = None  # None: with virtual pipeline stages
    batch_p2p_comm: Optional[bool] = None  # None: without virtual pipeline stages
    calculate_per_token_loss: bool = True
    seed: int = 1234
    num_layers: int = 2
    hidden_size: int = 128
    ffn_hidden_size: int = 352
    num_attention_heads: int = 4
    num_query_groups: Optional[int] = None
    kv_channels: Optional[int] = None
    max_position_embeddings: Optional[int] = None  # None: the window
    normalization: str = "rmsnorm"  # rmsnorm | layernorm
    layernorm_epsilon: float = 1e-5
    activation: str = "fast-swiglu"  # fast-swiglu | gelu
    bias: bool = False
    qkv_bias: bool = False
    qk_layernorm: bool = False
    share_embeddings_and_output_weights: bool = False
    rotary_base: float = 10000.0
    rotary_percentage: float = 1.0
    seq_len_interpolation_factor: Optional[float] = None
    init_method_std: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    make_vocab_size_divisible_by: int = 128
    override_vocab_size: Optional[int] = None  # None: from PREFIX.json
    mtp_num_layers: Optional[int] = None
    activations_checkpoint_granularity: Optional[str] = None  # selective | full
    activations_checkpoint_method: Optional[str] = None  # uniform | block, with full
    activations_checkpoint_num_layers: Optional[int] = None
    fp8: bool = False  # Transformer Engine FP8 on Hopper and later
    fp8_hybrid: bool = True  # E4M3 forward, E5M2 backward
    fp8_recipe: str = "delayed"  # delayed | tensorwise | blockwise
    fp8_amax_history_len: int = 1024
    fp8_amax_compute_algo: str = "max"
    transformer_engine: Optional[bool] = None  # None: on a GPU, where it is installed
    deterministic_mode: bool = False
    apply_rope_fusion: bool = False  # Transformer Engine's kernel
    cross_entropy_loss_fusion: bool = False  # megatron.core's own, compiled by torch
    loss_chunk_tokens: int = 0  # positions whose logits exist at once, for long windows; 0: all
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    exact: ExactConfig = field(default_factory=ExactConfig)


@dataclass
class RunConfig:
    """One training run. `restore_from_path` starts from another run's (or checkpoint's) weights, with a fresh optimizer."""

    restore_from_path: Optional[str] = None
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    @property
    def world_size(self) -> int:
        return self.trainer.devices * self.trainer.num_nodes

    @property
    def data_parallel_size(self) -> int:
        m = self.model
        return self.world_size // (
            m.tensor_model_parallel_size * m.pipeline_model_parallel_size * m.context_parallel_size
        )

    @property
    def num_microbatches(self) -> int:
        return self.model.global_batch_size // (self.model.micro_batch_size * self.data_parallel_size)

    @property
    def tokens_per_step(self) -> int:
        return self.model.global_batch_size * self.model.data.seq_length

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(self)))


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file and `key=value` overrides, and check everything that can be checked without a GPU or data.

    Args:
        path: YAML file, or None for the defaults.
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
    try:
        given = OmegaConf.load(path) if path is not None else OmegaConf.create()
        if not isinstance(given, DictConfig):
            raise ValueError(f"{path} holds a list, not keys and values")
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
        raise ValueError(f"{path} or an override is not YAML: {' '.join(str(error).split())}") from error
    except ConfigKeyError as error:
        raise ValueError(f"{path}: {error}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or path}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, RunConfig)
    check(config)
    return config


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
    one_of("model.fp8_recipe", m.fp8_recipe, ("delayed", "tensorwise", "blockwise"))
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
