"""Layer specs for `--spec cpu_spec NAME` on a CPU.

layer       Megatron's local spec with norms that know sequence parallelism; core attention is the stock one.
thd_layer   the same with a core attention for upstream's inter-document masking, whose only form in Megatron-LM needs a GPU.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from exact_megatron.training.model import RMSNorm


class ThdAttention(torch.nn.Module):
    """Causal attention document by document on Megatron's thd batches [t, heads, d]."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **kwargs):
        cuts = packed_seq_params.cu_seqlens_q.tolist()
        assert packed_seq_params.qkv_format == "thd" and query.dim() == 3 and cuts[-1] == len(query)
        out = []
        for a, b in zip(cuts, cuts[1:]):
            parts = [t[a:b].transpose(0, 1) for t in (query, key, value)]
            out.append(F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).transpose(0, 1))
        return torch.cat(out).flatten(1)


layer = get_gpt_layer_local_spec(normalization="RMSNorm")
layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
thd_layer = copy.deepcopy(layer)
thd_layer.submodules.self_attention.submodules.core_attention = ThdAttention
