"""What `deterministic_mode` needs from the machine: variables that libraries read when they start, and memory for the attention.

Read in Transformer Engine 2.20.2, Megatron-LM core_v0.16.1 (training/arguments.py) and core_v0.19.0 (training/determinism.py). Importing
this needs no torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..attention.supported import DETERMINISTIC_LIMIT
from ..utils.environment import GIB

if TYPE_CHECKING:
    from .schema import RunConfig

TRANSFORMER_ENGINE = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
NCCL_ALGO = ("Ring", "CollnetDirect", "CollnetChain", "^NVLS")  # Megatron-LM 0.19's; a list of them is fine
CUDNN = 92500  # from here on cuDNN's deterministic backward on Hopper needs no quadratic memory
FLASH_ATTN = "2.4.1"  # the first with a deterministic backward


def missing_environment(environment: Mapping[str, str], *, transformer_engine: bool, ranks: int) -> list[str]:
    """Assignments without which a GPU run is not deterministic, each with what stands there now; empty is fine.

    Args:
        transformer_engine: its attention is used.
        ranks: of the run; one rank reduces nothing by NCCL.
    """
    wanted: dict[str, tuple[str, ...]] = {"CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8")}
    if transformer_engine:
        wanted[TRANSFORMER_ENGINE] = ("0",)
    if ranks > 1:
        wanted["NCCL_ALGO"] = NCCL_ALGO
    found = []
    for name, values in wanted.items():
        given = environment.get(name)
        parts = [part.strip() for part in (given or "").split(",")] if name == "NCCL_ALGO" else [given]
        if not all(part in values for part in parts):
            found.append(f"{name}={values[0]} ({'not set' if given is None else f'now {given!r}'})")
    return found


def attention_workspace(run: RunConfig) -> int:
    """Bytes that cuDNN before 9.25 takes on Hopper for the deterministic backward of packed documents, at the least.

    2 a batch entry, head, query and key of a graph that is built for a number of documents rounded up to 32 (up to 32 of them) and for
    a number of tokens rounded up to a power of two (up to 32,768; then to a multiple of that): transformer_engine/common/fused_attn,
    utils.cu (get_max_batch_size, get_max_tokens) and fused_attn_f16_arbitrary_seqlen.cu. This agrees with what Transformer Engine
    observed: "~128 * BHSS bytes" for two sequences of S, and four times that for four (attention/dot_product_attention/utils.py).

    Heads and tokens are those of one call of DocumentAttention: with Ulysses a share of the heads sees whole samples, with a
    gather half of a context-parallel rank's queries see their documents, here one as long as the window.
    """
    heads, queries, keys = _call(run)
    return 32 * heads * _graph_tokens(queries) * _graph_tokens(keys) * 2


def attention_size(run: RunConfig) -> int:
    """Heads x query tokens x key tokens of the longest document that the run's windows allow; see DETERMINISTIC_LIMIT.

    Several documents do not add up: attention/kernels.py calls Transformer Engine for as many at a time as stay below the limit.
    """
    heads, queries, keys = _call(run)
    s = run.model.data.seq_length
    return heads * min(s, queries) * min(s, keys)


def _call(run: RunConfig) -> tuple[int, int, int]:
    """Heads, query and key tokens of one call of DocumentAttention."""
    m = run.model
    tp = m.tensor_model_parallel_size
    cp = m.context_parallel_size
    s = m.data.seq_length
    heads, kv_heads = m.num_attention_heads // tp, (m.num_query_groups or m.num_attention_heads) // tp
    queries = keys = s * m.micro_batch_size
    if cp > 1 and (m.cp_comm_type == "all_gather" or kv_heads % cp):
        queries = s // (2 * cp)
        keys = s
    elif cp > 1:
        heads //= cp
    return heads, queries, keys


def _flash_attention() -> bool:
    """Whether Transformer Engine may give a deterministic backward to flash-attn."""
    from packaging.version import Version  # megatron.core needs it; planning, which imports this module, does not

    if "0" in (os.environ.get("NVTE_FLASH_ATTN"), os.environ.get("NVTE_FLASH_ATTN_V2")):
        return False
    try:
        return Version(importlib.metadata.version("flash-attn")) >= Version(FLASH_ATTN)
    except importlib.metadata.PackageNotFoundError:
        return False


def _graph_tokens(tokens: int) -> int:
    return max(1024, 1 << (tokens - 1).bit_length()) if tokens <= 32768 else math.ceil(tokens / 32768) * 32768


def check(run: RunConfig) -> None:
    """Reject a deterministic run that this machine's GPU and environment cannot give.

    Raises:
        ValueError: model.deterministic_mode=true and a variable is missing or has another value, or the attention cannot fit.
    """
    import torch

    if not run.model.deterministic_mode:
        return
    half = run.trainer.precision == "bf16"  # in fp32 documents are attended by torch
    te = half and importlib.util.find_spec("transformer_engine") is not None
    missing = missing_environment(os.environ, transformer_engine=te, ranks=run.world_size)
    if missing:
        raise ValueError(
            f"model.deterministic_mode=true needs the environment {', '.join(missing)}: these variables are read by libraries "
            "when they start, so set them where the command is started, on every node"
        )
    hopper = torch.cuda.get_device_capability() == (9, 0)
    if not te or not hopper:
        return
    fused, size = os.environ.get("NVTE_FUSED_ATTN") != "0", attention_size(run)
    m = run.model
    tokens = f"model.data.seq_length={m.data.seq_length} x model.micro_batch_size={m.micro_batch_size}"
    if not _flash_attention() and (not fused or size >= DETERMINISTIC_LIMIT):
        why = (
            f"on Hopper Transformer Engine gives its deterministic backward to no cuDNN from heads x queries x keys of a document = "
            f"{DETERMINISTIC_LIMIT:,} on, and {tokens} can reach {size:,}"
            if fused
            else "NVTE_FUSED_ATTN=0 forbids cuDNN's attention"
        )
        raise ValueError(
            f"model.deterministic_mode=true: {why}; without flash-attn the scores of all documents, padded to the longest, would be "
            f"stored. Install flash-attn >= {FLASH_ATTN} (and leave NVTE_FLASH_ATTN, NVTE_FLASH_ATTN_V2 at 1), or set "
            "model.deterministic_mode=false"
        )
    cudnn = torch.backends.cudnn.version() or 0
    if not fused or cudnn >= CUDNN:
        return
    needed = attention_workspace(run)
    there = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if needed > there:
        raise ValueError(
            f"model.deterministic_mode=true: cuDNN {cudnn} takes {needed / GIB:,.1f} GiB for the deterministic backward of attention "
            f"over {tokens} on Hopper, the device has {there / GIB:,.1f} GiB. Use cuDNN 9.25 or later, or flash-attn >= {FLASH_ATTN} "
            "with NVTE_FUSED_ATTN=0, more tensor- or context-parallel ranks, or model.deterministic_mode=false"
        )


def require(run: RunConfig) -> None:
    """Put this GPU rank into deterministic mode, or out of it, as the run asks; before NCCL, cuBLAS or attention start.

    Raises:
        ValueError: see `check`.
    """
    import torch

    check(run)
    torch.use_deterministic_algorithms(run.model.deterministic_mode)
