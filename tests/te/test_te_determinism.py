"""Where Transformer Engine gives a deterministic backward of packed documents on Hopper to cuDNN: as `determinism` says."""

from __future__ import annotations

import pytest
import torch

from exact_megatron.attention import kernels
from exact_megatron.attention.supported import DETERMINISTIC_LIMIT

pytestmark = pytest.mark.te

HEADS = 32


@pytest.mark.parametrize("cudnn", [(9, 19, 0), (9, 25, 0)])
@pytest.mark.parametrize(
    "lengths",
    [(4096,), (4096, 4096), (2048,) * 4, (3000, 500, 300, 200, 96), (5792,), (5793,), (1200,) * 6 + (992,), (32768,)],
    ids=lambda lengths: f"{len(lengths)}x{max(lengths)}",
)
def test_limit_of_cudnns_deterministic_backward(te, monkeypatch, cudnn, lengths):
    import transformer_engine.pytorch.attention.dot_product_attention.utils as utils
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

    monkeypatch.setattr(tex, "get_fused_attn_backend", lambda *a, **k: (FusedAttnBackend["F16_arbitrary_seqlen"], ""))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(utils, "get_cudnn_version", lambda: cudnn)

    def fused(lengths):
        longest = max(lengths)
        wanted = utils.AttentionParams(
            qkv_dtype=torch.bfloat16,
            qkv_layout="thd_thd_thd",
            batch_size=len(lengths),
            num_heads=HEADS,
            num_gqa_groups=8,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            head_dim_qk=128,
            head_dim_v=128,
            attn_mask_type="padding_causal",
            window_size=(-1, 0),
            deterministic=True,
            is_training=True,
            core_attention_bias_requires_grad=False,
        )
        flash, _, fused, _, unfused, _ = utils.get_attention_backend(wanted)
        assert not flash, "flash-attn is not installed here"
        assert bool(unfused) != bool(fused)
        return bool(fused)

    longest = max(lengths)
    assert fused(lengths) == (len(lengths) * HEADS * longest**2 < DETERMINISTIC_LIMIT)
    # In groups every document goes to cuDNN, unless it is too long by itself.
    groups = [lengths[group] for group in kernels.deterministic_groups(lengths, lengths, HEADS)]
    assert sum(groups, ()) == lengths
    assert all(fused(group) == (HEADS * max(group) ** 2 < DETERMINISTIC_LIMIT) for group in groups)
