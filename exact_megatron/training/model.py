"""From the configuration to megatron.core's model, DDP, optimizer and schedule."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core import __version__ as megatron_version
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from ..attention.document_attention import DocumentAttention
from ..attention.supported import check_supported, transformer_engine_version, unsupported_loss
from . import rope
from .chunked_loss import chunk_loss
from .schema import RunConfig
from .torch_adam import restore_torch_adam_steps


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in megatron's form; megatron's own torch norm refuses sequence parallelism, where all that is needed is
    the mark that makes finalize_model_grads sum the weight's gradient over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm in megatron's form, see RMSNorm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def uses_transformer_engine(run: RunConfig) -> bool:
    """Whether the layers are Transformer Engine's.

    Raises:
        ValueError: asked for where it cannot be had, or FP8 without it.
    """
    wanted = run.model.transformer_engine
    there = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if wanted and not there:
        raise ValueError("model.transformer_engine=true needs a GPU and the package transformer-engine")
    if run.model.fp8 and (wanted is False or not there):
        raise ValueError("model.fp8=true needs a GPU and Transformer Engine: install it, or set model.fp8=false")
    return there if wanted is None else wanted


def fuses_gradient_accumulation(run: RunConfig) -> bool:
    """Whether linear layers add their weights' gradients to the fp32 sums themselves, without a gradient of their own in between.

    Transformer Engine's linears can; megatron.core's own (the output layer, and all of them without Transformer Engine) need apex's kernel.

    Raises:
        ValueError: asked for where there is no kernel for it.
    """
    wanted = run.model.gradient_accumulation_fusion
    there = torch.cuda.is_available() and (uses_transformer_engine(run) or _apex_fuses())
    if wanted and not there:
        raise ValueError(
            "model.gradient_accumulation_fusion=true needs a GPU, and Transformer Engine's layers or apex's "
            "fused_weight_gradient_mlp_cuda: install one, or leave it out"
        )
    return there if wanted is None else wanted


def _apex_fuses() -> bool:
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def _experts(run: RunConfig) -> dict[str, Any]:
    """megatron.core's settings of a mixture of experts; none for a dense model.

    Raises:
        ValueError: what of it needs a GPU, on a machine without.
    """
    m = run.model
    if m.num_moe_experts is None:
        return {}
    if m.moe_token_dispatcher_type == "alltoall" and not torch.cuda.is_available():
        raise ValueError(
            "model.moe_token_dispatcher_type=alltoall needs a GPU, it works with CUDA streams: use allgather"
        )
    if m.moe_grouped_gemm and not uses_transformer_engine(run):
        raise ValueError(
            "model.moe_grouped_gemm=true needs a GPU and Transformer Engine's layers: install it, or set it to false"
        )
    if not (torch.cuda.is_available() and transformer_engine_version()):
        moe_utils.te_general_gemm = None  # the router's kernel; 0.16 looks for the name where it is not installed, too
    coefficient = m.moe_aux_loss_coeff
    if m.calculate_per_token_loss and _core_version() < (0, 19):
        # Before 0.19 the loss is multiplied by too few tokens: those of one sequence- and context-parallel rank, and of one sample
        # (megatron/core/transformer/moe/router.py: attach_and_log_load_balancing_loss, _apply_seq_aux_loss).
        coefficient *= m.tensor_model_parallel_size * m.context_parallel_size
        coefficient *= m.micro_batch_size if m.moe_router_load_balancing_type == "seq_aux_loss" else 1
    return {
        "num_moe_experts": m.num_moe_experts,
        "moe_router_topk": m.moe_router_topk,
        "moe_router_pre_softmax": m.moe_router_topk == 1,
        "moe_ffn_hidden_size": m.moe_ffn_hidden_size or m.ffn_hidden_size,
        "moe_router_load_balancing_type": m.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": coefficient,
        "moe_token_dispatcher_type": m.moe_token_dispatcher_type,
        "moe_grouped_gemm": m.moe_grouped_gemm,
        "expert_model_parallel_size": m.expert_model_parallel_size,
    }


def _core_version() -> tuple[int, ...]:
    return tuple(map(int, megatron_version.split(".")[:2]))


def transformer_config(run: RunConfig) -> TransformerConfig:
    """megatron.core's configuration of the model and its parallel layout."""
    m = run.model
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if run.trainer.precision == "bf16" else torch.float32
    vpp = m.virtual_pipeline_model_parallel_size
    swiglu = m.activation == "fast-swiglu"
    fp8: dict[str, Any] = {}
    if m.fp8:
        fp8 = {
            "fp8": "hybrid" if m.fp8_hybrid else "e4m3",
            "fp8_recipe": m.fp8_recipe,
            "fp8_amax_history_len": m.fp8_amax_history_len,
            "fp8_amax_compute_algo": m.fp8_amax_compute_algo,
        }
    if m.cross_entropy_fusion_impl == "te" and not (gpu and transformer_engine_version()):
        raise ValueError(
            "model.cross_entropy_fusion_impl=te needs a GPU and the package transformer-engine: use native"
        )
    config = TransformerConfig(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups or m.num_attention_heads,
        kv_channels=m.kv_channels,
        gated_linear_unit=swiglu,
        activation_func=torch.nn.functional.silu if swiglu else torch.nn.functional.gelu,
        normalization="RMSNorm" if m.normalization == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=m.layernorm_epsilon,
        softmax_scale=rope.softmax_scale(m.kv_channels or m.hidden_size // m.num_attention_heads, m.rope_scaling),
        add_bias_linear=m.bias,
        add_qkv_bias=m.qkv_bias,
        qk_layernorm=m.qk_layernorm,
        hidden_dropout=m.hidden_dropout,
        attention_dropout=m.attention_dropout,
        init_method_std=m.init_method_std,
        tensor_model_parallel_size=m.tensor_model_parallel_size,
        pipeline_model_parallel_size=m.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=m.context_parallel_size,
        cp_comm_type=m.cp_comm_type,
        sequence_parallel=m.sequence_parallel and m.tensor_model_parallel_size > 1,
        overlap_p2p_comm=vpp is not None if m.overlap_p2p_comm is None else m.overlap_p2p_comm,
        batch_p2p_comm=vpp is None if m.batch_p2p_comm is None else m.batch_p2p_comm,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=m.calculate_per_token_loss,
        recompute_granularity=m.activations_checkpoint_granularity,
        recompute_method=m.activations_checkpoint_method,
        recompute_num_layers=m.activations_checkpoint_num_layers,
        deterministic_mode=m.deterministic_mode,
        # A checkpoint is the same for every layout only if every rank draws the whole tensor and takes its part.
        use_cpu_initialization=not gpu,
        gradient_accumulation_fusion=False,  # see fuse_gradient_accumulation
        masked_softmax_fusion=False,
        persist_layer_norm=gpu,
        # The fused GELU is its tanh approximation, and needs a bias: a model must not become another one on a GPU.
        bias_activation_fusion=gpu and swiglu,
        bias_dropout_fusion=gpu,
        apply_rope_fusion=m.apply_rope_fusion,
        cross_entropy_loss_fusion=m.cross_entropy_loss_fusion,
        cross_entropy_fusion_impl=m.cross_entropy_fusion_impl,
        mtp_num_layers=m.mtp_num_layers or None,
        mtp_loss_scaling_factor=m.mtp_loss_scaling_factor,
        **_experts(run),
        **fp8,
    )
    if refused := unsupported_loss(config):
        raise ValueError("\n".join(refused))
    if m.data.document_masking:
        check_supported(config, m.data.seq_length)
    return config


def layer_spec(
    run: RunConfig, config: TransformerConfig, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The GPT layers with DocumentAttention as their core attention; Transformer Engine's where it is used."""
    m = run.model
    experts = {"num_experts": m.num_moe_experts, "moe_grouped_gemm": m.moe_grouped_gemm}
    if uses_transformer_engine(run):
        spec = copy.deepcopy(get_gpt_layer_with_transformer_engine_spec(qk_layernorm=m.qk_layernorm, **experts))
        spec.submodules.self_attention.submodules.core_attention = DocumentAttention
        return spec
    spec = copy.deepcopy(
        get_gpt_layer_local_spec(qk_layernorm=m.qk_layernorm, normalization=config.normalization, **experts)
    )
    norm = RMSNorm if m.normalization == "rmsnorm" else LayerNorm
    layer = spec.submodules
    layer.self_attention.submodules.core_attention = DocumentAttention
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    if m.qk_layernorm:
        layer.self_attention.submodules.q_layernorm = layer.self_attention.submodules.k_layernorm = norm
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=norm
    )


def mtp_spec(
    run: RunConfig, config: TransformerConfig, layers: ModuleSpec | TransformerBlockSubmodules, vp_stage: int | None
) -> Any:
    """The layers of multi-token prediction on this stage, built like the model's own; None: it has none."""
    if not config.mtp_num_layers:
        return None
    engine = uses_transformer_engine(run)
    block = copy.deepcopy(get_gpt_mtp_block_spec(config, layers, use_transformer_engine=engine, vp_stage=vp_stage))
    if block is not None and not engine:
        for layer in block.layer_specs:
            norm = RMSNorm if run.model.normalization == "rmsnorm" else LayerNorm
            layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = norm
    return block


@contextmanager
def _all_experts_drawn() -> Iterator[None]:
    """Within the block a rank draws the weights of all experts and keeps its own, as it does with matrices (`use_cpu_initialization`):
    else every expert-parallel rank has the same ones, and another number of ranks others."""
    build = SequentialMLP.__init__

    @functools.wraps(build)
    def built(self: Any, local: int, config: Any, *args: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        build(self, config.num_moe_experts, config, *args, pg_collection=pg_collection, **kwargs)
        first = self.ep_group.rank() * local
        self.local_experts = self.local_experts[first : first + local]
        self.num_local_experts = local

    SequentialMLP.__init__ = built
    try:
        yield
    finally:
        SequentialMLP.__init__ = build


def build_chunks(run: RunConfig, vocab_size: int, device: torch.device) -> list[GPTModel]:
    """The model chunks of this rank: one, or one a virtual pipeline stage."""
    m = run.model
    config = transformer_config(run)
    vpp = m.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in [None] if vpp is None else range(vpp):
        stage = {} if vp_stage is None else {"ignore_virtual": False, "vp_stage": vp_stage}
        layers = layer_spec(run, config, vp_stage)
        with _all_experts_drawn() if config.use_cpu_initialization else nullcontext():
            model = GPTModel(
                config,
                layers,
                vocab_size=run.padded_vocab_size(vocab_size),
                max_sequence_length=m.max_position_embeddings or m.data.seq_length,
                pre_process=parallel_state.is_pipeline_first_stage(**stage),
                post_process=parallel_state.is_pipeline_last_stage(**stage),
                share_embeddings_and_output_weights=m.share_embeddings_and_output_weights,
                position_embedding_type="rope",
                rotary_base=m.rotary_base,  # type: ignore[arg-type]
                rotary_percent=m.rotary_percentage,
                seq_len_interpolation_factor=m.seq_len_interpolation_factor,
                mtp_block_spec=mtp_spec(run, config, layers, vp_stage),
                vp_stage=vp_stage,
            )
        rotary = model.rotary_pos_emb
        if m.rope_scaling.rope_type == "llama3":  # megatron.core's argument for it sets the factor alone
            scaling = m.rope_scaling.used()
            scaling.pop("rope_type")
            rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **scaling)
        elif m.rope_scaling.rope_type == "yarn":
            rotary.inv_freq = rope.yarn_frequencies(rotary.inv_freq, m.rotary_base, m.rope_scaling)
        model = model.to(device)
        if config.bf16:
            model = model.bfloat16()
        chunks.append(model)
    return chunks


def fuse_gradient_accumulation(model: torch.nn.Module) -> list[str]:
    """Let linear layers add to DDP's `main_grad`, see `fuses_gradient_accumulation`; returns their names.

    After construction, since megatron.core's setting reaches its own linears too, which refuse it without apex. The layers read the flag
    in every forward (transformer_engine 2.20.2: pytorch/module/linear.py, layernorm_linear.py; megatron.core 0.16 and 0.19:
    tensor_parallel/layers.py) and set `grad_added_to_main_grad` in backward, upon which DDP adds nothing. A model without DDP has no
    `main_grad`.
    """
    flags = ["fuse_wgrad_accumulation"] + ["gradient_accumulation_fusion"] * _apex_fuses()
    fused = []
    for name, module in model.named_modules():
        for flag in [f for f in flags if hasattr(module, f)]:
            setattr(module, flag, True)
            fused.append(name)
    return fused


def build_model(run: RunConfig, vocab_size: int, device: torch.device) -> list[DistributedDataParallel]:
    """The model chunks of this rank in megatron.core's DDP."""
    m = run.model
    chunks = build_chunks(run, vocab_size, device)
    for model in chunks:
        if m.loss_chunk_tokens and model.post_process:
            chunk_loss(model, m.loss_chunk_tokens)
        if fuses_gradient_accumulation(run):
            fuse_gradient_accumulation(model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=m.optim.overlap_grad_sync,
        overlap_param_gather=m.optim.overlap_param_sync,
        use_distributed_optimizer=m.optim.distributed,
        bucket_size=m.optim.bucket_cap_mb * 2**20 // 4 if m.optim.bucket_cap_mb else None,
    )
    return [
        DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
    ]


def build_optimizer(run: RunConfig, model: list[DistributedDataParallel]) -> tuple[Any, OptimizerParamScheduler]:
    """megatron.core's Adam and its learning-rate schedule (counted in steps), wired into the model's schedule hooks."""
    m = run.model
    optim = run.model.optim
    steps = run.trainer.max_steps
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.sched.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            clip_grad=run.trainer.gradient_clip_val,
            bf16=run.trainer.precision == "bf16",
            params_dtype=torch.bfloat16 if run.trainer.precision == "bf16" else torch.float32,
            use_distributed_optimizer=optim.distributed,
            overlap_param_gather=optim.overlap_param_sync,
        ),
        model,  # type: ignore[arg-type]
    )
    restore_torch_adam_steps()
    style = {"CosineAnnealing": "cosine", "WSD": "WSD", "constant": "constant"}[optim.sched.name]
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.sched.min_lr,
        lr_warmup_steps=optim.sched.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=style,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=optim.sched.wsd_decay_steps,
        lr_wsd_decay_style="linear",
    )
    config = model[0].config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if m.optim.overlap_grad_sync:
        syncs = [chunk.no_sync for chunk in model]
        config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
        if m.optim.overlap_param_sync and len(model) > 1:
            config.param_sync_func = [chunk.start_param_sync for chunk in model]
    return optimizer, scheduler
