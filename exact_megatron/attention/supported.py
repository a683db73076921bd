"""What of a model EXACT cannot train right, by the names that megatron-core's TransformerConfig and Megatron-LM's arguments share.
Standard library only, so that a login node can say it."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

from ..refusals import Row, is_above_1, is_set, reasons

# Documents x heads x longest query x longest key of a call: from here on Transformer Engine gives a deterministic backward of packed
# documents on Hopper to no cuDNN of any version (2.20.2, attention/dot_product_attention/utils.py, SM90_DET_FUSED_THD_BWD_MAX_BHSS).
DETERMINISTIC_LIMIT = 1 << 30

# Megatron's words for the exchanges. p2p, a ring, is what Megatron-LM has where nothing was asked for.
COMM_TYPES = {None: "auto", "p2p": "auto", "a2a": "ulysses", "all_gather": "gather"}


def _unset(name: str, remedy: str) -> Row:
    return Row(name, is_set, lambda value: f"{name}={value!r}: {remedy}")


def _kinds(comm: Any) -> list[Any]:
    """The different exchanges of cp_comm_type, which is one for all layers or one a layer."""
    return list(dict.fromkeys(comm if isinstance(comm, (list, tuple)) else [comm]))


def _unknown(comm: Any) -> list[Any]:
    return [kind for kind in _kinds(comm) if kind not in COMM_TYPES]


def _kv_heads(tp: int | None, groups: int | None, heads: int | None) -> int:
    """Of a tensor-parallel rank."""
    return max(1, (groups or heads or 1) // (tp or 1))


# What DocumentAttention would compute wrongly or not at all. `window` is the sequence length S where that is known.
ATTENTION = (
    _unset("multi_latent_attention", "use multi-head or grouped-query attention"),
    _unset("experimental_attention_variant", "unset it"),
    _unset("is_hybrid_model", "state-space layers carry their state across documents"),
    _unset("window_size", "sliding windows are not built, unset it"),
    _unset("attention_dropout", "set it to 0.0"),
    Row("softmax_type", lambda v: v not in (None, "vanilla"), lambda v: f"softmax_type={v!r}: use 'vanilla'"),
    _unset("qk_clip", "the kernels return no logits, unset it"),
    _unset("log_max_attention_logit", "the kernels return no logits, unset it"),
    _unset("fp8_dot_product_attention", "unset it, fp8 linear layers are fine"),
    _unset("fp8_multi_head_attention", "unset it, fp8 linear layers are fine"),
    _unset("mtp_hsm", "it rolls hidden states by cu_seqlens as if the batch were thd, unset it"),
    _unset("hybrid_context_parallel", "use context_parallel_size alone"),
    _unset("cuda_graph_impl", "a graph keeps its first boundaries, unset it"),
    _unset("enable_cuda_graph", "a graph keeps its first boundaries, unset it"),
    _unset("external_cuda_graph", "a graph keeps its first boundaries, unset it"),
    Row(
        "context_parallel_size fused_single_qkv_rope",
        lambda cp, fused: is_above_1(cp) and fused,
        lambda cp, fused: f"fused_single_qkv_rope={fused!r}: its RoPE does not know context parallelism, unset it",
    ),
    Row(
        "window context_parallel_size",
        lambda window, cp: window is not None and is_above_1(cp) and window % (2 * cp),
        lambda window, cp: f"seq_length={window} with context_parallel_size={cp}: use a multiple of {2 * cp}",
    ),
    Row(
        "window context_parallel_size tensor_model_parallel_size sequence_parallel",
        lambda window, cp, tp, sp: (
            window is not None and sp and not (is_above_1(cp) and window % (2 * cp)) and window // (cp or 1) % (tp or 1)
        ),
        lambda window, cp, tp, sp: (
            f"sequence_parallel=True with {window}/{cp or 1} tokens a rank (seq_length/cp): use a "
            f"seq_length that leaves a multiple of tensor_model_parallel_size={tp or 1}"
        ),
    ),
    Row(
        "context_parallel_size cp_comm_type",
        lambda cp, comm: is_above_1(cp) and _unknown(comm),
        lambda cp, comm: f"cp_comm_type={', '.join(map(repr, _unknown(comm)))}: use a2a or all_gather, or leave it out",
    ),
    Row(
        "context_parallel_size cp_comm_type tensor_model_parallel_size num_query_groups num_attention_heads",
        lambda cp, comm, *heads: is_above_1(cp) and "a2a" in _kinds(comm) and _kv_heads(*heads) % cp,
        lambda cp, comm, *heads: (
            f"cp_comm_type='a2a': {_kv_heads(*heads)} KV heads of a tensor-parallel rank do not divide by "
            f"context_parallel_size={cp}, use all_gather or leave it out"
        ),
    ),
)

# Losses whose backward does not weight targets one by one, whoever masks documents. Transformer Engine's fused cross entropy
# (transformer_engine/pytorch/triton/cross_entropy.py: element_mul_kernel) gives all targets the gradient of the first in 2.2 to 2.7, and
# reads a gradient that is not contiguous as if it were in 2.8 to 2.10.
LOSS = (
    Row(
        "cross_entropy_loss_fusion cross_entropy_fusion_impl",
        lambda fused, kind: fused and kind == "te" and not _weights_each_target(transformer_engine_version()),
        lambda fused, kind: (
            f"cross_entropy_fusion_impl='te' with Transformer Engine {transformer_engine_version() or 'that is not found here'}: before "
            "2.11 its fused cross entropy gives targets the weights of others. Use 'native', or a newer one"
        ),
    ),
)


def unsupported(config: Any, seq_length: int | None = None) -> list[str]:
    """Every setting that DocumentAttention would compute wrongly or not at all, with its value and remedy; empty is fine.

    Args:
        config: TransformerConfig of any megatron-core version, or Megatron-LM's arguments; a field that it lacks counts as unset.
        seq_length: S, to check what it must divide by; None leaves that out.
    """
    return reasons(ATTENTION, {"window": seq_length}, config)


def unsupported_loss(config: Any) -> list[str]:
    """Losses that would be weighted wrongly, with the remedy; empty is fine. `config` is as in `unsupported`."""
    return reasons(LOSS, config)


def _weights_each_target(transformer_engine: str | None) -> bool:
    return bool(transformer_engine) and tuple(map(int, str(transformer_engine).split(".")[:2])) >= (2, 11)


def transformer_engine_version() -> str | None:
    """Version of the installed Transformer Engine, "2.11.0", or None."""
    try:
        return re.match(r"[\d.]+", importlib.metadata.version("transformer-engine"))[0]  # type: ignore[index]
    except importlib.metadata.PackageNotFoundError:
        return None


def check_supported(config: Any, seq_length: int | None = None) -> None:
    """Refuse by name what `unsupported` finds (same arguments).

    Raises:
        ValueError: every refused setting with its value and remedy, one a line.
    """
    found = unsupported(config, seq_length)
    if found:
        raise ValueError("DocumentAttention does not support\n  " + "\n  ".join(found))
