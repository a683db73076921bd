"""Which sizes FP8 products take. Pure arithmetic: no torch, no Transformer Engine.

Read in Transformer Engine 2.20.2. Its linears want an input of [tokens, I] and a weight of [O, I] with tokens and O divisible by 8 and I
by 16 (pytorch/utils.py: assert_dim_for_fp8_exec), and cuBLAS wants the innermost dimension of every operand divisible by 16
(common/gemm/cublaslt_gemm.cu: CanonicalizeGemmInput). On Hopper the innermost dimension is always the one that is summed over: I in
forward, O in the input's gradient, and all tokens of the micro-batch in the weight's gradient. The recipes delayed, tensorwise and
blockwise agree in this; blockwise rounds its blocks of 128 up. The output layer and the embedding are not FP8, so that the vocabulary
may have any size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .schema import RunConfig

PRODUCT = 16  # of a dimension that a product sums over
SHARD = 8  # of the tokens that a rank holds under sequence parallelism, before they are gathered
BLOCK = 128  # of blockwise scaling


def misaligned(run: RunConfig) -> list[str]:
    """Every size of the model and of a micro-batch that FP8 products do not take, with its settings and a remedy; empty is fine."""
    m = run.model
    tp = m.tensor_model_parallel_size
    cp = m.context_parallel_size
    s = m.data.seq_length
    head = m.kv_channels or m.hidden_size // m.num_attention_heads
    groups = m.num_query_groups or m.num_attention_heads
    over = f" over model.tensor_model_parallel_size={tp}" if tp > 1 else ""
    sizes = [
        (m.hidden_size, f"model.hidden_size={m.hidden_size}"),
        (m.ffn_hidden_size / tp, f"model.ffn_hidden_size={m.ffn_hidden_size}{over}"),
        (head * m.num_attention_heads / tp, f"{m.num_attention_heads} heads of {head} channels{over}"),
        (
            head * (m.num_attention_heads + 2 * groups) / tp,
            f"the outputs of QKV, {m.num_attention_heads} + 2 x {groups} heads of {head} channels{over}",
        ),
    ]
    found = [f"{what} is {size:g}, not a multiple of {PRODUCT}" for size, what in sizes if size % PRODUCT]
    multiple = math.lcm(PRODUCT, SHARD * tp) if m.sequence_parallel else PRODUCT
    if s * m.micro_batch_size % (cp * multiple):
        window = cp * multiple // math.gcd(m.micro_batch_size, multiple)
        shard = f", and those of a sequence-parallel rank by {SHARD}" if m.sequence_parallel and tp > 1 else ""
        found.append(
            f"the tokens of a micro-batch on a rank, model.data.seq_length={s} x model.micro_batch_size={m.micro_batch_size} / "
            f"model.context_parallel_size={cp} = {s * m.micro_batch_size / cp:g}, must divide by {PRODUCT}{shard}: use a seq_length "
            f"that is a multiple of {window}, or another micro_batch_size"
        )
    return found


def slow(run: RunConfig) -> list[str]:
    """What FP8 computes right and slower than it could, for `plan`."""
    m = run.model
    tokens = m.data.seq_length * m.micro_batch_size // m.context_parallel_size // m.tensor_model_parallel_size
    gathers = m.sequence_parallel and m.tensor_model_parallel_size > 1
    if m.fp8_recipe != "blockwise" or not gathers or not (tokens % BLOCK or m.hidden_size % BLOCK):
        return []
    return [
        f"model.fp8_recipe=blockwise gathers {tokens} tokens of {m.hidden_size} channels a sequence-parallel rank in bf16: with both a "
        f"multiple of {BLOCK} it gathers them in FP8"
    ]
