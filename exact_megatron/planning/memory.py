"""Memory of one GPU, by pipeline stage, from a run's configuration alone: no torch, no GPU, no data.

What is counted, in bytes, with e = 2 for trainer.precision=bf16 and 4 for 32:

* weights: e a parameter. gradients: 4, the runner sums them in fp32 (training/model.py: grad_reduce_in_fp32). optimizer: Adam's two
  fp32 moments, and in bf16 an fp32 copy of the weights; a distributed optimizer shares these among the data- and
  context-parallel ranks. As megatron/training/theoretical_memory_usage.py (Megatron-LM core_v0.19.0): 6 + 12 / d bytes a
  parameter in bf16, 18 without sharing; that script takes d without context parallelism.
* activations: the tensors that backward needs, layer by layer, after Korthikanti et al. (arXiv 2205.05198, section 4),
  counted again for SwiGLU, grouped queries, RoPE and flash attention; `layer_activations` has the terms. Layers in flight
  are those of 1F1B and of the interleaved schedule (section 4.2.3 there).
* logits: in bf16 and, for the loss, in fp32, on the last stage only; Transformer Engine's fused cross entropy keeps a copy in bf16.
* working: what lives for one moment of the backward pass: the gradients inside one layer, and the largest weight's gradient
  before it is added to the fp32 sum.
* overhead: assumptions, not formulas, see OVERHEAD and ALLOCATOR.

An estimate, and no bound: kernels' workspaces, fragmentation and the communication library's buffers are in `overhead` only.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from ..utils.environment import GIB

if TYPE_CHECKING:
    from ..training.schema import ModelConfig, RunConfig

OVERHEAD = 4 * GIB  # assumed: CUDA context, NCCL's buffers, workspaces of cuBLAS, cuDNN and Transformer Engine
ALLOCATOR = 0.05  # assumed: of activations, logits and working memory, lost in torch's allocator


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each GPU of a pipeline stage; `parameters` is a count, `in_flight` the layers' activations held at once, in
    whole layers of one micro-batch."""

    stage: int
    parameters: int
    in_flight: float
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    working: int
    overhead: int

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in PARTS)


PARTS = [f.name for f in fields(StageMemory) if f.name not in ("stage", "parameters", "in_flight")]


def attention_widths(m: ModelConfig) -> tuple[int, int, int]:
    """(channels of a head, of all queries, of all keys)."""
    head = m.kv_channels or m.hidden_size // m.num_attention_heads
    return head, head * m.num_attention_heads, head * (m.num_query_groups or m.num_attention_heads)


def layer_matrices(m: ModelConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the matrices of one layer, as Megatron fuses them; biases apart.

    Raises:
        ValueError: a mixture of experts or multi-token prediction.
    """
    for key in ("num_moe_experts", "mtp_num_layers"):
        if getattr(m, key):
            raise ValueError(
                f"model.{key}={getattr(m, key)}: only dense layers that predict one token are counted here. Train a few steps and look "
                "at memory.json in the run's folder"
            )
    _, q, kv = attention_widths(m)
    gated = m.activation == "fast-swiglu"
    return {
        "qkv": (m.hidden_size, q + 2 * kv),
        "attention output": (q, m.hidden_size),
        "gate and up" if gated else "up": (m.hidden_size, (2 if gated else 1) * m.ffn_hidden_size),
        "down": (m.ffn_hidden_size, m.hidden_size),
    }


def matrix_parameters(m: ModelConfig) -> int:
    """Weights of one layer's matrices."""
    return sum(inputs * outputs for inputs, outputs in layer_matrices(m).values())


def layer_parameters(m: ModelConfig, tp: int = 1) -> int:
    """Parameters of one layer on a tensor-parallel rank. Norms and the biases behind row-parallel matrices are on every rank."""
    head, q, kv = attention_widths(m)
    gates = 2 if m.activation == "fast-swiglu" else 1
    norm = 1 if m.normalization == "rmsnorm" else 2
    shared = matrix_parameters(m)
    whole = 2 * norm * m.hidden_size
    if m.bias or m.qkv_bias:
        shared += q + 2 * kv
    if m.bias:
        shared += gates * m.ffn_hidden_size
        whole += 2 * m.hidden_size
    if m.qk_layernorm:
        whole += 2 * norm * head
    return shared // tp + whole


def parameters(run: RunConfig, vocab_size: int) -> int:
    """Parameters of the whole model, each counted once."""
    whole = dataclasses.replace(run.model, tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    return rank_parameters(whole, run.padded_vocab_size(vocab_size), 0)


def rank_parameters(m: ModelConfig, vocab_size: int, stage: int) -> int:
    """Parameters on each rank of a pipeline stage, with a padded vocabulary. Tied embeddings exist twice when the first and
    the last stage are two."""
    tp, stages = m.tensor_model_parallel_size, m.pipeline_model_parallel_size
    table = vocab_size * m.hidden_size // tp
    count = m.num_layers // stages * layer_parameters(m, tp)
    if stage == 0:
        count += table
    if stage == stages - 1:
        count += m.hidden_size * (1 if m.normalization == "rmsnorm" else 2)
        if stages > 1 or not m.share_embeddings_and_output_weights:
            count += table
    return count


def element_size(run: RunConfig) -> int:
    return 2 if run.trainer.precision == "bf16" else 4


def state_bytes(run: RunConfig, count: int) -> tuple[int, int, int]:
    """(weights, gradients, optimizer states) of `count` parameters of a rank."""
    m = run.model
    e = element_size(run)
    shards = run.data_parallel_size * m.context_parallel_size if m.optim.distributed else 1
    return e * count, 4 * count, math.ceil((12 if e == 2 else 8) * count / shards)


def layer_activations(run: RunConfig) -> int:
    """Bytes that one layer keeps for the backward of one micro-batch, without recomputation (or with `selective`).

    Elements a token, h hidden, q and k channels of all queries and keys, f of the MLP, over t tensor-parallel ranks:

    * 4 h: the inputs of the two norms (the residual stream) and their outputs; divided by t with sequence parallelism only.
    * (3 q + 3 k) / t: the fused QKV output, which v keeps alive as a view (q + 2 k), q and k after RoPE, the attention's
      output; (3 q + 2 k) / t with several samples a micro-batch, where the kernel has q, k and v of its own and the output
      is there twice; + q / t where context-parallel ranks gather K/V and join two chunks. Flash attention keeps no scores.
    * 3 f / t: both halves before SwiGLU, and its output; 2 f for GELU.
    * RoPE's cosines and sines for q and for k, 4 head widths a position whatever the micro-batch size: unfused, each layer
      makes its own.

    And 4 bytes a head and token of the softmax's logarithms, a byte of dropout masks. `selective` recomputes the core
    attention alone, which with a flash kernel gives back only those logarithms: it is counted as none.
    """
    m = run.model
    tp, cp = m.tensor_model_parallel_size, m.context_parallel_size
    split = tp if m.sequence_parallel else 1
    head, q, kv = attention_widths(m)
    positions = m.data.seq_length // cp
    tokens = positions * m.micro_batch_size
    gathers = cp > 1 and (m.cp_comm_type == "all_gather" or kv // head // tp % cp != 0)
    mlp = 3 if m.activation == "fast-swiglu" else 2
    attention = 3 * q + (3 if m.micro_batch_size == 1 else 2) * kv + (q if gathers else 0)
    elements = 4 * m.hidden_size / split + (attention + mlp * m.ffn_hidden_size) / tp
    kept = tokens * (elements * element_size(run) + 4 * m.num_attention_heads / tp)
    if m.hidden_dropout:
        kept += tokens * 2 * m.hidden_size / split
    return math.ceil(kept + positions * 4 * head * m.rotary_percentage * element_size(run))


def chunks_in_flight(run: RunConfig, stage: int) -> int:
    """Forward passes of model chunks (a stage's layers, or a virtual stage's) whose backward is to come, at the most.

    1F1B: p - stage micro-batches. Interleaved: 2 (p - stage - 1) + (v - 1) p + 1 chunks (megatron/core/pipeline_parallel/
    schedules.py, core_v0.16.1: get_pp_rank_microbatches), that is 1 + (p - 1) / (p v) times the layers of p micro-batches on
    the first stage. Never more than the step has.
    """
    m = run.model
    p, v = m.pipeline_model_parallel_size, m.virtual_pipeline_model_parallel_size
    if v is None:
        return min(run.num_microbatches, p - stage)
    return min(run.num_microbatches * v, 2 * (p - stage - 1) + (v - 1) * p + 1)


def stage_memory(run: RunConfig, vocab_size: int, stage: int) -> StageMemory:
    """Estimate for each GPU of pipeline stage `stage`, see the module's docstring. The configuration must have passed `check`."""
    m = run.model
    tp, cp, p = m.tensor_model_parallel_size, m.context_parallel_size, m.pipeline_model_parallel_size
    v = m.virtual_pipeline_model_parallel_size or 1
    e = element_size(run)
    first = stage == 0
    last = stage == p - 1
    tokens = m.data.seq_length // cp * m.micro_batch_size
    _, q, kv = attention_widths(m)
    vocabulary = run.padded_vocab_size(vocab_size)
    count = rank_parameters(m, vocabulary, stage)
    weights, gradients, optimizer = state_bytes(run, count)
    if m.fp8:  # Transformer Engine keeps an FP8 copy of each matrix, and its transpose, over a step's micro-batches
        weights += 2 * matrix_parameters(m) // tp * (m.num_layers // p)

    hidden = tokens * m.hidden_size * e // (tp if m.sequence_parallel else 1)
    whole = layer_activations(run)
    layers = m.num_layers // (p * v)
    chunk = layers * whole
    again = 0
    if m.activations_checkpoint_granularity == "full":
        size = m.activations_checkpoint_num_layers or 1
        if m.activations_checkpoint_method == "uniform":
            chunk, again = math.ceil(layers / size) * hidden, min(size, layers) * whole
        else:
            chunk = min(size, layers) * hidden + max(0, layers - size) * whole
            again = whole
    if p > 1:
        chunk += hidden  # what is sent to the next stage (deallocate_pipeline_outputs is off)
    chunks = chunks_in_flight(run, stage)
    activations = chunks * chunk + again

    at_once = min(tokens, m.loss_chunk_tokens * m.micro_batch_size) if m.loss_chunk_tokens else tokens
    for_loss = e if m.cross_entropy_fusion_impl == "te" else 4 if e == 2 else 0
    logits = at_once * vocabulary // tp * (e + for_loss) + 2 * hidden if last else 0
    gathered = tokens * m.hidden_size * e * (2 if m.sequence_parallel and tp > 1 else 1)
    gates = 2 if m.activation == "fast-swiglu" else 1
    working = gathered + tokens * max((gates + 1) * m.ffn_hidden_size, 3 * q + 2 * kv) // tp * e
    if cp > 1:  # K/V, and their gradients, of the whole sample, or all heads' part of it
        working += 4 * tokens * cp * kv // tp * e
    matrices = [m.hidden_size * m.ffn_hidden_size * gates // tp]
    if first or last:
        matrices.append(vocabulary * m.hidden_size // tp)
    working += e * max(matrices)
    overhead = 0
    if run.trainer.accelerator != "cpu":
        overhead = OVERHEAD + int(ALLOCATOR * (activations + logits + working))
    return StageMemory(
        stage, count, chunks * layers, weights, gradients, optimizer, activations, logits, working, overhead
    )


def memory(run: RunConfig, vocab_size: int) -> list[StageMemory]:
    """One estimate for each pipeline stage."""
    return [stage_memory(run, vocab_size, stage) for stage in range(run.model.pipeline_model_parallel_size)]
