"""What of a model EXACT cannot train right, by the names that megatron-core's TransformerConfig and Megatron-LM's arguments share.
Standard library only, so that a login node can say it."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

# Megatron's words for the exchanges. p2p, a ring, is what Megatron-LM has where nothing was asked for.
COMM_TYPES = {None: "auto", "p2p": "auto", "a2a": "ulysses", "all_gather": "gather"}

_REFUSED = {
    "multi_latent_attention": "use multi-head or grouped-query attention",
    "experimental_attention_variant": "unset it",
    "is_hybrid_model": "state-space layers carry their state across documents",
    "window_size": "sliding windows are not built, unset it",
    "attention_dropout": "set it to 0.0",
    "softmax_type": "use 'vanilla'",
    "qk_clip log_max_attention_logit": "the kernels return no logits, unset it",
    "fp8_dot_product_attention fp8_multi_head_attention": "unset it, fp8 linear layers are fine",
    "mtp_hsm": "it rolls hidden states by cu_seqlens as if the batch were thd, unset it",
    "hybrid_context_parallel": "use context_parallel_size alone",
    "cuda_graph_impl enable_cuda_graph external_cuda_graph": "a graph keeps its first boundaries, unset it",
}


def unsupported(config: Any, seq_length: int | None = None) -> list[str]:
    """Every setting that DocumentAttention would compute wrongly or not at all, with its value and remedy; empty is fine.

    Args:
        config: TransformerConfig of any megatron-core version, or Megatron-LM's arguments; a field that it lacks counts as unset.
        seq_length: S, to check what it must divide by; None leaves that out.
    """
    cp, tp = (getattr(config, f"{n}_parallel_size", None) or 1 for n in ("context", "tensor_model"))
    asked = [(name, remedy) for names, remedy in _REFUSED.items() for name in names.split()]
    if cp > 1:
        asked.append(("fused_single_qkv_rope", "its RoPE does not know context parallelism, unset it"))
    values = [(name, getattr(config, name, None), remedy) for name, remedy in asked]
    off = (None, False, 0, "none", "vanilla")
    found = [f"{name}={value!r}: {remedy}" for name, value, remedy in values if value not in off]
    if seq_length is not None and cp > 1 and seq_length % (2 * cp):
        found.append(f"seq_length={seq_length} with context_parallel_size={cp}: use a multiple of {2 * cp}")
    elif seq_length is not None and getattr(config, "sequence_parallel", False) and seq_length // cp % tp:
        found.append(
            f"sequence_parallel=True with {seq_length}/{cp} tokens a rank (seq_length/cp): use a "
            f"seq_length that leaves a multiple of tensor_model_parallel_size={tp}"
        )
    comm = getattr(config, "cp_comm_type", None)
    for kind in dict.fromkeys(comm if isinstance(comm, (list, tuple)) else [comm]) if cp > 1 else ():
        heads = max(
            1, (getattr(config, "num_query_groups", None) or getattr(config, "num_attention_heads", None) or 1) // tp
        )
        if kind not in COMM_TYPES:
            found.append(f"cp_comm_type={kind!r}: use a2a or all_gather, or leave it out")
        elif COMM_TYPES[kind] == "ulysses" and heads % cp:
            found.append(
                f"cp_comm_type='a2a': {heads} KV heads of a tensor-parallel rank do not divide by "
                f"context_parallel_size={cp}, use all_gather or leave it out"
            )
    return found


def unsupported_loss(config: Any) -> list[str]:
    """Losses whose backward does not weight targets one by one, whoever masks documents; empty is fine.

    Transformer Engine's fused cross entropy (transformer_engine/pytorch/triton/cross_entropy.py: element_mul_kernel) gives all targets
    the gradient of the first in 2.2 to 2.7, and reads a gradient that is not contiguous as if it were in 2.8 to 2.10.

    Args:
        config: as in `unsupported`.
    """
    if (
        not getattr(config, "cross_entropy_loss_fusion", False)
        or getattr(config, "cross_entropy_fusion_impl", None) != "te"
    ):
        return []
    found = transformer_engine_version()
    if found and tuple(map(int, found.split(".")[:2])) >= (2, 11):
        return []
    return [
        f"cross_entropy_fusion_impl='te' with Transformer Engine {found or 'that is not found here'}: before 2.11 its fused cross "
        "entropy gives targets the weights of others. Use 'native', or a newer one"
    ]


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
