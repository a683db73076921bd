"""Which Hugging Face tensors make up each of megatron.core's, and how their rows are ordered. Needs torch only.

megatron.core stores the layers' tensors stacked, [layers, ...], under one key each. The keys are Transformer Engine's for either
layer spec: the local spec's `sharded_state_dict_keys_map` (gpt_layer_specs.py:294 in 0.16.1) renames input_layernorm to
self_attention.linear_qkv.layer_norm_weight and pre_mlp_layernorm to mlp.linear_fc1.layer_norm_weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..training.schema import ModelConfig

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class Tensor:
    """One of megatron.core's tensors (of one layer).

    Attributes:
        key: in a dist_checkpointing checkpoint.
        parts: Hugging Face names and shapes, in the order of the rows; `{}` stands for the layer's number.
        groups: KV heads whose rows of q, k and v are interleaved; 0: the parts lie one after another.
        padding: rows (with groups) or else columns of zeros that are added at the end.
    """

    key: str
    parts: dict[str, tuple[int, ...]]
    groups: int = 0
    padding: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = list(self.parts.values())
        rows = sum(shape[0] for shape in shapes)
        columns = list(shapes[0][1:])
        if self.groups:
            rows += self.padding
        elif self.padding:
            columns[-1] += self.padding
        return (rows, *columns)

    def pack(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Hugging Face's tensors to megatron.core's."""
        if self.groups:
            rows = torch.cat([part.reshape(self.groups, -1, *part.shape[1:]) for part in parts], 1)
            tensor = rows.reshape(-1, *parts[0].shape[1:])
        else:
            tensor = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return torch.cat([tensor, self._zeros(tensor)], 0 if self.groups else -1) if self.padding else tensor

    def _zeros(self, tensor: torch.Tensor) -> torch.Tensor:
        shape = (self.padding, *tensor.shape[1:]) if self.groups else (*tensor.shape[:-1], self.padding)
        return tensor.new_zeros(shape)

    def unpack(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The reverse of `pack`; contiguous tensors of the shapes in `parts`.

        Raises:
            ValueError: the padding is not zero, so that the model without it is another.
        """
        if self.padding:
            axis = 0 if self.groups else -1
            tensor, padding = tensor.split([tensor.shape[axis] - self.padding, self.padding], axis)
            if padding.any():
                raise ValueError(f"{self.key}: the heads that pad the model are not zero: they cannot be left out")
        shapes = list(self.parts.values())
        if not self.groups:
            return [part.contiguous() for part in tensor.split([shape[0] for shape in shapes])]
        rows = tensor.reshape(self.groups, -1, *tensor.shape[1:])
        split = rows.split([shape[0] // self.groups for shape in shapes], 1)
        return [part.reshape(shape).contiguous() for part, shape in zip(split, shapes)]

    def names(self, layer: int | None) -> list[str]:
        return [name.format(layer) for name in self.parts]


def first_tensors(model: ModelConfig, vocab_size: int) -> list[Tensor]:
    """What comes before the layers."""
    return [Tensor(EMBEDDING, {"model.embed_tokens.weight": (vocab_size, model.hidden_size)})]


def layer_tensors(model: ModelConfig, kv_heads: int) -> list[Tensor]:
    """One layer's, in the order in which transformers names them.

    Args:
        model: Megatron's; it may have more KV heads (and query heads with them) than Hugging Face's.
        kv_heads: of Hugging Face's model.
    """
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    head = model.kv_channels or hidden // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    heads = model.num_attention_heads // groups * kv_heads
    rows = {"q": heads * head, "k": kv_heads * head, "v": kv_heads * head}
    extra_heads, extra_kv_heads = model.num_attention_heads - heads, groups - kv_heads
    self_attn, attention = "model.layers.{}.self_attn.", "decoder.layers.self_attention."

    def qkv(what: str, *columns: int) -> Tensor:
        parts = {f"{self_attn}{name}_proj.{what}": (n, *columns) for name, n in rows.items()}
        return Tensor(f"{attention}linear_qkv.{what}", parts, kv_heads, (extra_heads + 2 * extra_kv_heads) * head)

    tensors = [qkv("weight", hidden)]
    tensors += [qkv("bias")] if model.qkv_bias else []
    if model.qk_layernorm:
        tensors += [
            Tensor(f"{attention}{n}_layernorm.weight", {f"{self_attn}{n}_norm.weight": (head,)}) for n in ("q", "k")
        ]
    mlp = "model.layers.{}.mlp."
    return [
        *tensors,
        Tensor(
            f"{attention}linear_proj.weight",
            {f"{self_attn}o_proj.weight": (hidden, rows["q"])},
            padding=extra_heads * head,
        ),
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


def groups_of_tensors(model: ModelConfig, vocab_size: int, kv_heads: int) -> Iterator[tuple[list[Tensor], int | None]]:
    """All tensors in the order in which they are converted, with the number of the layer they are of; None: of no layer."""
    yield first_tensors(model, vocab_size), None
    for layer in range(model.num_layers):
        yield layer_tensors(model, kv_heads), layer
    yield last_tensors(model, vocab_size), None


def all_parts(model: ModelConfig, vocab_size: int, kv_heads: int) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face name and shape, in the order in which they are converted."""
    named: dict[str, tuple[int, ...]] = {}
    for group, layer in groups_of_tensors(model, vocab_size, kv_heads):
        for tensor in group:
            named |= {name: shape for name, shape in zip(tensor.names(layer), tensor.parts.values())}
    return named
