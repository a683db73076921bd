"""The native runner's settings and their defaults, with NeMo's key names (trainer.*, model.*, exp_manager.*)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import OmegaConf

from ..config import ExactConfig, QKTimingConfig

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
    accept_other_tokenizer: bool = (
        False  # data of another tokenizer than the model's, or than other members of the blend
    )


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
class RopeScalingConfig:
    """`rope_scaling` of a config.json, with its names; scaling of type linear is model.seq_len_interpolation_factor."""

    rope_type: str = "default"  # default | llama3
    factor: float = 8.0  # the rest is read with llama3 only
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


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
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    init_method_std: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    make_vocab_size_divisible_by: int = 128
    override_vocab_size: Optional[int] = None  # rows of the vocabulary, at least the data's; None: from PREFIX.json
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
    qk_timing: QKTimingConfig = field(default_factory=QKTimingConfig)


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

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Vocabulary rounded up so that every tensor-parallel rank holds the same number of rows; the same for every tensor
        size that divides make_vocab_size_divisible_by, since padded rows take part in the softmax."""
        multiple = math.lcm(self.model.make_vocab_size_divisible_by, self.model.tensor_model_parallel_size)
        return math.ceil(vocab_size / multiple) * multiple

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(self)))
