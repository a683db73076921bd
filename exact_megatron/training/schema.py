"""The native runner's settings, with NeMo's key names (trainer.*, model.*, exp_manager.*).

The line of a setting has its default, kind and range. What several settings must fulfil together is in checks.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import OmegaConf

from ..config import ExactConfig, QKTimingConfig, parse_scalar
from ..ranges import LARGEST_FLOAT, LONGEST_WINDOW, SMALLEST_EPS, choice, number, setting, switch, text, whole

# Optional[...] instead of `| None`: omegaconf reads these annotations on Python 3.10 too.
# ruff: noqa: UP045


def _betas(value: Any) -> list[float]:
    if not isinstance(value, (list, tuple)):
        raise TypeError
    first, second = (float(beta) for beta in value)
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ValueError
    return [first, second]


def _prefixes(value: Any) -> Any:
    """One or several prefixes, or these by split; `parse_blend` and `data_prefixes` know weights and the names of splits."""
    if isinstance(value, dict):
        return {name: None if blend is None else _blend(blend) for name, blend in value.items()}
    return _blend(value)


def has_weights(entries: list[Any]) -> bool:
    """Whether the entries are [weight, prefix, weight, prefix, ...]; as in Megatron-LM, every other one is then a number."""
    pairs = len(entries) > 1 and len(entries) % 2 == 0
    return pairs and all(_WEIGHT.fullmatch(str(entry)) for entry in entries[::2])


def _blend(value: Any) -> Any:
    if isinstance(value, list) and has_weights(value):
        weights = [parse_scalar(entry) if isinstance(entry, str) else entry for entry in value[::2]]
        if any(isinstance(weight, str) for weight in weights):  # 010
            raise ValueError
        value = [entry for pair in zip(weights, value[1::2]) for entry in pair]
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, (int, float)) and not isinstance(entry, bool):
            sound = 0 <= entry <= LARGEST_FLOAT
        else:
            sound = isinstance(entry, str) and bool(entry.strip()) and "\0" not in entry
        if not sound:
            raise ValueError
    return value


_PREFIXES = "a prefix, [prefix, ...] or [weight, prefix, ...], or these by split, {train: ..., validation: ...}"
_SHARE = r"\s*([0-9]{1,18}(\.[0-9]*)?|\.[0-9]+)\s*"
_SHARES = rf"{_SHARE}([,/]{_SHARE}){{0,2}}"
_WEIGHT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.?(nan|inf)", re.IGNORECASE)


@dataclass
class TrainerConfig:
    devices: int = whole(1, least=1, most=1024)  # ranks on a node
    num_nodes: int = whole(1, least=1)
    accelerator: str = choice("auto", ["auto", "gpu", "cpu"])
    precision: str = choice("32", ["32", "bf16"])
    max_steps: int = whole(1000, least=1)
    val_check_interval: int = whole(0, least=0)  # steps between validations; 0: only at the end
    limit_val_batches: int = whole(0, least=0)  # global batches a validation; 0: no validation
    log_every_n_steps: int = whole(1, least=1)  # steps between log lines; metrics.jsonl has every step
    gradient_clip_val: float = number(1.0, least=0)  # 0: no clipping


@dataclass
class CheckpointCallbackParams:
    every_n_train_steps: int = whole(0, least=0)  # 0: only at the end and at a stop signal
    save_top_k: int = whole(2, least=1, also=[-1])  # newest checkpoints kept; -1: all
    save_last: bool = switch(True)  # at the end


@dataclass
class ExpManagerConfig:
    exp_dir: str = text("runs/run")
    resume_if_exists: bool = switch(True)
    create_tensorboard_logger: bool = switch(True)
    checkpoint_callback_params: CheckpointCallbackParams = field(default_factory=CheckpointCallbackParams)


@dataclass
class DataConfig:
    # [prefix], [weight, prefix, weight, prefix, ...], or {train: [...], validation: [...], test: [...]}
    data_prefix: Any = setting(None, _PREFIXES, _prefixes, text=True, required=True)
    # used when data_prefix is one blend for all splits
    splits_string: str = text("99,1,0", "up to three shares, for example 99,1,0", _SHARES)
    index_mapping_dir: Optional[str] = text(None)  # Megatron's index caches and the census; null: beside the data
    seq_length: int = whole(4096, least=1, most=LONGEST_WINDOW)
    num_workers: int = whole(2, least=0, most=1024)  # loader processes a rank; 0: in the rank itself
    eod_mask_loss: bool = switch(False)
    document_masking: bool = switch(True)  # a target sees its own document only
    eod_id: Optional[int] = whole(None, least=0)  # null: from PREFIX.json, as `exact-megatron prepare` writes it
    # data of another tokenizer than the model's, or than other members of the blend
    accept_other_tokenizer: bool = switch(False)


@dataclass
class SchedConfig:
    name: str = choice("CosineAnnealing", ["CosineAnnealing", "WSD", "constant"])
    warmup_steps: int = whole(0, least=0)
    min_lr: float = number(0.0, least=0)
    wsd_decay_steps: int = whole(0, least=0)  # length of the decay at the end of a WSD schedule


@dataclass
class OptimConfig:
    name: str = choice(
        "mcore_distributed_optim", ["mcore_distributed_optim", "distributed_fused_adam", "adam", "fused_adam"]
    )
    lr: float = number(3e-4, least=0)
    weight_decay: float = number(0.1, least=0)
    betas: list[float] = setting([0.9, 0.95], "two numbers from 0 to below 1, for example [0.9,0.95]", _betas)
    eps: float = number(1e-8, least=SMALLEST_EPS, most=1)
    overlap_grad_sync: bool = switch(False)
    overlap_param_sync: bool = switch(False)
    bucket_cap_mb: int = whole(0, least=0)  # 0: Megatron's own choice
    sched: SchedConfig = field(default_factory=SchedConfig)

    @property
    def distributed(self) -> bool:
        return self.name in ("mcore_distributed_optim", "distributed_fused_adam")


# What each type reads from a config.json's rope_scaling (transformers 5.24: modeling_rope_utils).
ROPE_SCALING_KEYS = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
    ),
}


@dataclass
class RopeScalingConfig:
    """`rope_scaling` of a config.json, with its names; scaling of type linear is model.seq_len_interpolation_factor."""

    rope_type: str = choice("default", ["default", "llama3", "yarn"])
    factor: float = number(8.0, least=1)
    original_max_position_embeddings: int = whole(8192, least=1)
    low_freq_factor: float = number(1.0, above=0)  # llama3
    high_freq_factor: float = number(4.0, above=0)  # llama3
    beta_fast: float = number(32.0, above=0)  # yarn: turns in the original window from which a frequency stays as it is
    beta_slow: float = number(1.0, above=0)  # yarn: turns up to which it is divided by factor
    attention_factor: Optional[float] = number(None, above=0)  # yarn: scales queries and keys; null: 0.1 ln(factor) + 1
    truncate: bool = switch(True)  # yarn: the ramp between both begins and ends at whole dimensions

    def used(self) -> dict[str, Any]:
        """The settings that `rope_type` reads, without those that are null."""
        values = {key: getattr(self, key) for key in ("rope_type", *ROPE_SCALING_KEYS[self.rope_type])}
        return {key: value for key, value in values.items() if value is not None}


@dataclass
class ModelConfig:
    micro_batch_size: int = whole(1, least=1)
    global_batch_size: int = whole(8, least=1)
    tensor_model_parallel_size: int = whole(1, least=1)
    pipeline_model_parallel_size: int = whole(1, least=1)
    virtual_pipeline_model_parallel_size: Optional[int] = whole(None, least=2)
    context_parallel_size: int = whole(1, least=1)
    cp_comm_type: Optional[str] = choice(None, ["a2a", "all_gather"])  # null: a2a where the KV heads allow it
    sequence_parallel: bool = switch(False)  # without effect at tensor_model_parallel_size=1
    overlap_p2p_comm: Optional[bool] = switch(None)  # null: with virtual pipeline stages
    batch_p2p_comm: Optional[bool] = switch(None)  # null: without virtual pipeline stages
    calculate_per_token_loss: bool = switch(True)
    seed: int = whole(1234, least=0)
    num_layers: int = whole(2, least=1)
    hidden_size: int = whole(128, least=1)
    ffn_hidden_size: int = whole(352, least=1)
    num_attention_heads: int = whole(4, least=1)
    num_query_groups: Optional[int] = whole(None, least=1)
    kv_channels: Optional[int] = whole(None, least=1)
    max_position_embeddings: Optional[int] = whole(None, least=1)  # null: the window
    normalization: str = choice("rmsnorm", ["rmsnorm", "layernorm"])
    layernorm_epsilon: float = number(1e-5, least=SMALLEST_EPS, most=1)
    activation: str = choice("fast-swiglu", ["fast-swiglu", "gelu"])
    bias: bool = switch(False)
    qkv_bias: bool = switch(False)
    qk_layernorm: bool = switch(False)
    share_embeddings_and_output_weights: bool = switch(False)
    rotary_base: float = number(10000.0, above=1)
    rotary_percentage: float = number(1.0, above=0, most=1)
    seq_len_interpolation_factor: Optional[float] = number(None, above=0)
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    init_method_std: float = number(0.02, above=0)
    hidden_dropout: float = number(0.0, least=0, below=1)
    attention_dropout: float = number(0.0, least=0, below=1)
    make_vocab_size_divisible_by: int = whole(128, least=1)
    override_vocab_size: Optional[int] = whole(
        None, least=1
    )  # rows of the vocabulary, at least the data's; null: from PREFIX.json
    num_moe_experts: Optional[int] = whole(None, least=2)  # in every layer, in place of its MLP; null: a dense model
    moe_router_topk: int = whole(
        2, least=1
    )  # experts of a token; with 1 the router's softmax is taken before the choice
    moe_ffn_hidden_size: Optional[int] = whole(None, least=1)  # of an expert; null: ffn_hidden_size
    # An auxiliary loss of a micro-batch, or of each sample. (megatron.core's global_aux_loss weighs less the more data-parallel ranks
    # there are, and sinkhorn routes a token by later ones.)
    moe_router_load_balancing_type: str = choice("aux_loss", ["aux_loss", "seq_aux_loss", "none"])
    moe_aux_loss_coeff: float = number(0.0, least=0)
    moe_token_dispatcher_type: str = choice("allgather", ["allgather", "alltoall"])  # alltoall: on a GPU
    moe_grouped_gemm: bool = switch(False)  # Transformer Engine's kernel for all experts of a rank
    expert_model_parallel_size: int = whole(
        1, least=1
    )  # of the data- and context-parallel ranks, which share the experts
    mtp_num_layers: Optional[int] = whole(None, least=0)  # depths of multi-token prediction
    mtp_loss_scaling_factor: float = number(0.1, least=0)  # of the mean of the depths' losses
    activations_checkpoint_granularity: Optional[str] = choice(None, ["selective", "full"])
    activations_checkpoint_method: Optional[str] = choice(None, ["uniform", "block"])  # with full
    activations_checkpoint_num_layers: Optional[int] = whole(None, least=1)
    fp8: bool = switch(False)  # Transformer Engine FP8 on Hopper and later
    fp8_hybrid: bool = switch(True)  # E4M3 forward, E5M2 backward
    fp8_recipe: str = choice("delayed", ["delayed", "tensorwise", "blockwise"])
    fp8_amax_history_len: int = whole(1024, least=1)
    fp8_amax_compute_algo: str = choice("max", ["max", "most_recent"])
    transformer_engine: Optional[bool] = switch(None)  # null: on a GPU, where it is installed
    gradient_accumulation_fusion: Optional[bool] = switch(None)  # null: on a GPU, where there are kernels for it
    deterministic_mode: bool = switch(False)  # on a GPU it needs environment variables, and names them
    apply_rope_fusion: bool = switch(False)  # Transformer Engine's kernel
    cross_entropy_loss_fusion: bool = switch(False)
    cross_entropy_fusion_impl: str = choice(
        "native", ["native", "te"]
    )  # compiled by torch, or Transformer Engine's (2.11 on)
    loss_chunk_tokens: int = whole(0, least=0)  # positions whose logits exist at once, for long windows; 0: all
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    exact: ExactConfig = field(default_factory=ExactConfig)
    qk_timing: QKTimingConfig = field(default_factory=QKTimingConfig)


@dataclass
class RunConfig:
    """One training run. `restore_from_path` starts from another run's (or checkpoint's) weights, with a fresh optimizer."""

    restore_from_path: Optional[str] = text(None)
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

    @property
    def whole_documents(self) -> bool:
        """Whether a sequence of the data must be a whole document, see packing.check_index."""
        return self.model.data.document_masking or self.model.exact.enabled

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Vocabulary rounded up so that every tensor-parallel rank holds the same number of rows; the same for every tensor
        size that divides make_vocab_size_divisible_by, since padded rows take part in the softmax."""
        multiple = math.lcm(self.model.make_vocab_size_divisible_by, self.model.tensor_model_parallel_size)
        return math.ceil(vocab_size / multiple) * multiple

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(self)))
