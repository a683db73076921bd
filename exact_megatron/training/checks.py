"""What the settings of a run must fulfil together; the range of each one is on its line in schema.py."""

from __future__ import annotations

import dataclasses

from ..ranges import range_of, settings
from .fp8 import misaligned
from .schema import RunConfig


def check(config: RunConfig) -> None:
    """Refuse settings that are out of range or do not fit together.

    Raises:
        ValueError: names the keys, their values and what to change.
    """
    for key, field, value in settings(config):
        range_of(field).accept(key, value)
    for topic in (_ranks, _layers, _experts, _heads, _window, _loss, _fp8, _recomputation, _optimizer, _data):
        topic(config)


def _ranks(config: RunConfig) -> None:
    m, t = config.model, config.trainer
    tp, pp, cp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size, m.context_parallel_size
    if config.world_size % (tp * pp * cp):
        raise ValueError(
            f"{config.world_size} ranks (trainer.devices={t.devices} x trainer.num_nodes={t.num_nodes}) cannot be divided into groups "
            f"of tensor {tp} x pipeline {pp} x context {cp} = {tp * pp * cp}: change one of these sizes, "
            "model.tensor_model_parallel_size, model.pipeline_model_parallel_size or model.context_parallel_size"
        )
    group = m.micro_batch_size * config.data_parallel_size
    if m.global_batch_size % group:
        raise ValueError(
            f"model.global_batch_size={m.global_batch_size} must be a multiple of model.micro_batch_size={m.micro_batch_size} x "
            f"{config.data_parallel_size} data-parallel ranks = {group} (trainer.devices={t.devices} x trainer.num_nodes={t.num_nodes})"
        )


def _layers(config: RunConfig) -> None:
    m = config.model
    tp, pp, vpp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size, m.virtual_pipeline_model_parallel_size
    if m.num_layers % (pp * (vpp or 1)):
        raise ValueError(
            f"model.num_layers={m.num_layers} must be a multiple of the {pp * (vpp or 1)} (virtual) pipeline stages: "
            f"model.pipeline_model_parallel_size={pp}"
            + (f" x model.virtual_pipeline_model_parallel_size={vpp}" if vpp is not None else "")
        )
    if m.ffn_hidden_size % tp:
        raise ValueError(
            f"model.ffn_hidden_size={m.ffn_hidden_size} must be a multiple of model.tensor_model_parallel_size={tp}"
        )
    if vpp is None:
        return
    if pp == 1:
        raise ValueError(
            f"model.virtual_pipeline_model_parallel_size={vpp} needs model.pipeline_model_parallel_size > 1"
        )
    if config.num_microbatches % pp:
        raise ValueError(
            f"virtual pipeline stages need a number of micro-batches ({config.num_microbatches}) that is a multiple of {pp} stages"
        )
    if m.batch_p2p_comm:
        raise ValueError(
            "model.batch_p2p_comm=true with virtual pipeline stages gives wrong gradients without an error (megatron-core 0.16 "
            "and 0.19 on gloo): leave it out, or set model.overlap_p2p_comm=true and model.batch_p2p_comm=false"
        )


def _experts(config: RunConfig) -> None:
    m = config.model
    tp, ep, experts = m.tensor_model_parallel_size, m.expert_model_parallel_size, m.num_moe_experts
    if experts is None:
        for key in [f.name for f in dataclasses.fields(m) if f.name.startswith(("moe_", "expert_"))]:
            value = getattr(m, key)
            if value != getattr(RunConfig().model, key):
                raise ValueError(f"model.{key}={value} without experts: set model.num_moe_experts, or leave it out")
        return
    if experts % ep:
        raise ValueError(f"model.num_moe_experts={experts} must be a multiple of model.expert_model_parallel_size={ep}")
    shared = config.data_parallel_size * m.context_parallel_size
    if shared % ep:
        raise ValueError(
            f"model.expert_model_parallel_size={ep} must divide the {shared} ranks of data and context parallelism together"
        )
    if m.moe_router_topk > experts:
        raise ValueError(f"model.moe_router_topk={m.moe_router_topk} is above model.num_moe_experts={experts}")
    width = m.moe_ffn_hidden_size or m.ffn_hidden_size
    if width % tp:
        raise ValueError(
            f"model.moe_ffn_hidden_size={width} must be a multiple of model.tensor_model_parallel_size={tp}"
        )
    if tp > 1 and not m.sequence_parallel:
        raise ValueError(
            f"model.num_moe_experts={experts} with model.tensor_model_parallel_size={tp} needs model.sequence_parallel=true: "
            "megatron.core routes the tokens of a tensor-parallel rank, and would count each of them once a rank"
        )
    if tp > 1 and m.bias:
        raise ValueError(f"model.bias=true: experts over model.tensor_model_parallel_size={tp} ranks have no biases")
    if m.moe_aux_loss_coeff and m.moe_router_load_balancing_type == "none":
        raise ValueError(
            f"model.moe_aux_loss_coeff={m.moe_aux_loss_coeff:g} with model.moe_router_load_balancing_type=none, which has no "
            "auxiliary loss: choose one, or set the coefficient to 0"
        )
    if m.fp8:
        raise ValueError("model.fp8=true with model.num_moe_experts: FP8 experts were never run, set model.fp8=false")


def _heads(config: RunConfig) -> None:
    m = config.model
    tp, cp = m.tensor_model_parallel_size, m.context_parallel_size
    for key, heads in (("num_attention_heads", m.num_attention_heads), ("num_query_groups", m.num_query_groups)):
        if heads is not None and heads % tp:
            raise ValueError(f"model.{key}={heads} must be a multiple of model.tensor_model_parallel_size={tp}")
    if m.num_query_groups is not None and m.num_attention_heads % m.num_query_groups:
        raise ValueError(
            f"model.num_attention_heads={m.num_attention_heads} must be a multiple of num_query_groups={m.num_query_groups}"
        )
    if m.kv_channels is None and m.hidden_size % m.num_attention_heads:
        raise ValueError(
            f"model.hidden_size={m.hidden_size} must be a multiple of model.num_attention_heads={m.num_attention_heads}, or set "
            "model.kv_channels, the channels of a head"
        )
    channels = m.kv_channels or m.hidden_size // m.num_attention_heads
    rotated = int(channels * m.rotary_percentage)
    if rotated < 2 or rotated % 2:
        raise ValueError(
            f"a head has {channels} channels (model.kv_channels={'null' if m.kv_channels is None else m.kv_channels}, "
            f"model.hidden_size={m.hidden_size}, model.num_attention_heads={m.num_attention_heads}), of which "
            f"model.rotary_percentage={m.rotary_percentage:g} rotates {rotated}: it must be an even number of at least 2"
        )
    kv_heads = (m.num_query_groups or m.num_attention_heads) // tp
    if m.cp_comm_type == "a2a" and kv_heads % cp:
        raise ValueError(
            f"model.cp_comm_type=a2a shares heads among context-parallel ranks, and the {kv_heads} KV heads of a tensor-parallel rank do "
            f"not divide by model.context_parallel_size={cp}: use all_gather, or leave it out"
        )
    if m.attention_dropout:
        raise ValueError(
            f"model.attention_dropout={m.attention_dropout}: the attention over documents has none, set it to 0.0"
        )


def _window(config: RunConfig) -> None:
    m = config.model
    window = config.model.data.seq_length
    tp, cp = m.tensor_model_parallel_size, m.context_parallel_size
    if cp > 1 and window % (2 * cp):
        raise ValueError(
            f"model.data.seq_length={window} must be a multiple of 2 x model.context_parallel_size = {2 * cp}"
        )
    if window > (longest := m.max_position_embeddings or window):
        raise ValueError(
            f"model.data.seq_length={window} is above model.max_position_embeddings={longest}: raise it, and extend the window "
            "with model.rotary_base, model.rope_scaling or model.seq_len_interpolation_factor"
        )
    if m.sequence_parallel and (window // cp) % tp:
        raise ValueError(
            f"sequence parallelism needs the {window // cp} tokens of a context-parallel rank to be a multiple of "
            f"model.tensor_model_parallel_size={tp}"
        )
    scaling = m.rope_scaling
    if scaling.rope_type == "default":
        return
    if m.seq_len_interpolation_factor is not None:
        raise ValueError(
            "model.rope_scaling and model.seq_len_interpolation_factor both scale the positions: choose one"
        )
    if scaling.rope_type == "yarn":
        if m.rotary_percentage != 1:
            raise ValueError(
                f"model.rope_scaling.rope_type=yarn scales whole queries and keys, model.rotary_percentage={m.rotary_percentage:g} "
                "rotates a part of them: set it to 1"
            )
        if scaling.beta_fast <= scaling.beta_slow:
            raise ValueError(
                f"model.rope_scaling.beta_fast={scaling.beta_fast:g} must be above model.rope_scaling.beta_slow={scaling.beta_slow:g}"
            )
        return
    if scaling.high_freq_factor <= scaling.low_freq_factor:  # llama3 divides by their difference
        raise ValueError(
            f"model.rope_scaling.high_freq_factor={scaling.high_freq_factor:g} must be above "
            f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor:g}"
        )


def _loss(config: RunConfig) -> None:
    m = config.model
    data = config.model.data
    if m.loss_chunk_tokens and m.sequence_parallel and m.tensor_model_parallel_size > 1:
        raise ValueError(
            f"model.loss_chunk_tokens={m.loss_chunk_tokens} needs model.sequence_parallel=false, or set it to 0"
        )
    if m.cross_entropy_fusion_impl == "te" and not m.cross_entropy_loss_fusion:
        raise ValueError(
            "model.cross_entropy_fusion_impl=te needs model.cross_entropy_loss_fusion=true, which turns the fusion on"
        )
    if m.cross_entropy_fusion_impl == "te" and m.loss_chunk_tokens:
        raise ValueError(
            f"model.cross_entropy_fusion_impl=te takes all logits at once, model.loss_chunk_tokens={m.loss_chunk_tokens} some of them: "
            "choose one (chunks work with the native fusion)"
        )
    if m.deterministic_mode and m.cross_entropy_loss_fusion:
        raise ValueError(
            "model.deterministic_mode=true with model.cross_entropy_loss_fusion=true: Megatron-LM allows no fused cross entropy in "
            "deterministic mode, set model.cross_entropy_loss_fusion=false"
        )
    if m.mtp_num_layers and m.loss_chunk_tokens:
        raise ValueError(
            f"model.mtp_num_layers={m.mtp_num_layers} takes all logits of a depth at once: set model.loss_chunk_tokens="
            f"{m.loss_chunk_tokens} to 0"
        )
    if m.exact.enabled and not data.document_masking and not m.exact.allow_unmasked_documents:
        raise ValueError(
            "model.exact.enabled=true with model.data.document_masking=false: targets would be weighted by a context that is not what "
            "they see. Mask documents, or ask for it with model.exact.allow_unmasked_documents=true"
        )
    if m.exact.enabled:
        m.exact.validated(data.seq_length)
    if not m.calculate_per_token_loss and m.context_parallel_size > 1 and data.eod_mask_loss:
        raise ValueError(
            "model.calculate_per_token_loss=false with model.context_parallel_size > 1 and model.data.eod_mask_loss=true "
            "averages over context-parallel ranks that supervise different numbers of targets: use model.calculate_per_token_loss=true"
        )


def _fp8(config: RunConfig) -> None:
    if config.model.fp8 and (found := misaligned(config)):
        raise ValueError("model.fp8=true with sizes that FP8 products do not take:\n  " + "\n  ".join(found))


def _recomputation(config: RunConfig) -> None:
    m = config.model
    granularity, method, layers = (
        m.activations_checkpoint_granularity,
        m.activations_checkpoint_method,
        m.activations_checkpoint_num_layers,
    )
    full = granularity == "full"
    if full and method is None:
        raise ValueError(
            "model.activations_checkpoint_granularity=full needs model.activations_checkpoint_method=uniform or block"
        )
    if full != (layers is not None):
        raise ValueError(
            f"model.activations_checkpoint_num_layers={layers} with model.activations_checkpoint_granularity="
            f"{granularity}: full recomputation needs a number of layers, anything else takes none"
        )
    if m.mtp_num_layers and method == "uniform" and layers != 1:
        raise ValueError(
            f"model.mtp_num_layers={m.mtp_num_layers} with model.activations_checkpoint_method=uniform needs "
            f"model.activations_checkpoint_num_layers=1, not {layers}: megatron.core recomputes a depth by itself"
        )
    stage = m.num_layers // (m.pipeline_model_parallel_size * (m.virtual_pipeline_model_parallel_size or 1))
    if layers is not None and (layers > stage or (method == "uniform" and stage % layers)):
        raise ValueError(
            f"model.activations_checkpoint_num_layers={layers} must {'divide' if method == 'uniform' else 'be at most'} the {stage} "
            f"layers of a (virtual) pipeline stage with model.activations_checkpoint_method={method}"
        )


def _optimizer(config: RunConfig) -> None:
    optim = config.model.optim
    steps = config.trainer.max_steps
    sched = optim.sched
    if optim.overlap_param_sync and not (optim.distributed and optim.overlap_grad_sync):
        raise ValueError(
            "model.optim.overlap_param_sync needs a distributed optimizer and model.optim.overlap_grad_sync=true"
        )
    if sched.warmup_steps >= steps and sched.warmup_steps:
        raise ValueError(f"model.optim.sched.warmup_steps={sched.warmup_steps} must be below trainer.max_steps={steps}")
    if sched.name == "WSD" and not 0 < sched.wsd_decay_steps <= steps:
        raise ValueError(
            f"a WSD schedule needs model.optim.sched.wsd_decay_steps in 1..{steps}, not {sched.wsd_decay_steps}"
        )
    if sched.min_lr > optim.lr:
        raise ValueError(f"model.optim.sched.min_lr={sched.min_lr} is above model.optim.lr={optim.lr}")


def _data(config: RunConfig) -> None:
    if not config.model.data.data_prefix:
        raise ValueError(
            "model.data.data_prefix is empty: give the prefix of a .bin/.idx pair (see `exact-megatron prepare`)"
        )
