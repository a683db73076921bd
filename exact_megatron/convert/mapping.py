"""Which Hugging Face tensors make up each of megatron.core's, and how their rows are ordered. Needs torch only.

megatron.core stores the layers' tensors stacked, [layers, ...], under one key each. The keys are Transformer Engine's for either
layer spec: the local spec's `sharded_state_dict_keys_map` (gpt_layer_specs.py:294 in 0.16.1) renames input_layernorm to
self_attention.linear_qkv.layer_norm_weight and pre_mlp_layernorm to mlp.linear_fc1.layer_norm_weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from ..training.config import ModelConfig

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class Tensor:
    """One of megatron.core's tensors (of one layer).

    Attributes:
        key: in a dist_checkpointing checkpoint.
        parts: Hugging Face names and shapes, in the order of the rows; `{}` stands for the layer's number.
        groups: KV heads whose rows of q, k and v are interleaved; 0: the parts lie one after another.
    """

    key: str
    parts: dict[str, tuple[int, ...]]
    groups: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = list(self.parts.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def pack(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Hugging Face's tensors to megatron.core's."""
        if len(parts) == 1:
            return parts[0]
        if not self.groups:
            return torch.cat(list(parts))
        rows = [part.reshape(self.groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(rows, 1).reshape(self.shape)

    def unpack(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The reverse of `pack`; contiguous tensors of the shapes in `parts`."""
        shapes = list(self.parts.values())
        if not self.groups:
            return [part.contiguous() for part in tensor.split([shape[0] for shape in shapes])]
        rows = tensor.reshape(self.groups, -1, *tensor.shape[1:])
        split = rows.split([shape[0] // self.groups for shape in shapes], 1)
        return [part.reshape(shape).contiguous() for part, shape in zip(split, shapes)]

    def names(self, layer: int) -> list[str]:
        return [name.format(layer) for name in self.parts]


def first_tensors(model: ModelConfig, vocab_size: int) -> list[Tensor]:
    """What comes before the layers."""
    return [Tensor(EMBEDDING, {"model.embed_tokens.weight": (vocab_size, model.hidden_size)})]


def layer_tensors(model: ModelConfig) -> list[Tensor]:
    """One layer's, in the order in which transformers names them."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    head = model.kv_channels or hidden // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    rows = {"q": model.num_attention_heads * head, "k": groups * head, "v": groups * head}
    self_attn, attention = "model.layers.{}.self_attn.", "decoder.layers.self_attention."

    def qkv(what: str, *columns: int) -> Tensor:
        parts = {f"{self_attn}{name}_proj.{what}": (n, *columns) for name, n in rows.items()}
        return Tensor(f"{attention}linear_qkv.{what}", parts, groups)

    tensors = [qkv("weight", hidden)]
    tensors += [qkv("bias")] if model.qkv_bias else []
    if model.qk_layernorm:
        tensors += [
            Tensor(f"{attention}{n}_layernorm.weight", {f"{self_attn}{n}_norm.weight": (head,)}) for n in ("q", "k")
        ]
    mlp = "model.layers.{}.mlp."
    return [
        *tensors,
        Tensor(f"{attention}linear_proj.weight", {f"{self_attn}o_proj.weight": (hidden, rows["q"])}),
        Tensor(
            "decoder.layers.mlp.linear_fc1.weight",
            {f"{mlp}gate_proj.weight": (ffn, hidden), f"{mlp}up_proj.weight": (ffn, hidden)},
        ),
        Tensor("decoder.layers.mlp.linear_fc2.weight", {f"{mlp}down_proj.weight": (hidden, ffn)}),
        Tensor(f"{attention}linear_qkv.layer_norm_weight", {"model.layers.{}.input_layernorm.weight": (hidden,)}),
        Tensor(
            "decoder.layers.mlp.linear_fc1.layer_norm_weight",
            {"model.layers.{}.post_attention_layernorm.weight": (hidden,)},
        ),
    ]


def last_tensors(model: ModelConfig, vocab_size: int) -> list[Tensor]:
    """What comes after the layers. Tied models have no output layer of their own."""
    tensors = [Tensor("decoder.final_layernorm.weight", {"model.norm.weight": (model.hidden_size,)})]
    if not model.share_embeddings_and_output_weights:
        tensors.append(Tensor(OUTPUT, {"lm_head.weight": (vocab_size, model.hidden_size)}))
    return tensors


def all_parts(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face name and shape, in the order in which they are converted."""
    named: dict[str, tuple[int, ...]] = {}
    for tensor in first_tensors(model, vocab_size):
        named |= tensor.parts
    for layer in range(model.num_layers):
        for tensor in layer_tensors(model):
            named |= {name.format(layer): shape for name, shape in tensor.parts.items()}
    for tensor in last_tensors(model, vocab_size):
        named |= tensor.parts
    return named


def parameters(model: ModelConfig, vocab_size: int) -> int:
    return sum(prod(shape) for shape in all_parts(model, vocab_size).values())
