"""Document attention in one process: dense masked attention, leaks, refusals, the CUDA kernels' arguments."""

from __future__ import annotations

import inspect
import random
import sys
import types
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from exact_megatron.attention import (
    DocumentAttention,
    DocumentBoundaries,
    boundaries,
    check_supported,
    document_boundaries,
    kernels,
)

S, D = 96, 8


def config(heads: int = 4, groups: int | None = None, **more) -> TransformerConfig:
    given = dict(
        num_layers=1,
        hidden_size=heads * D,
        num_attention_heads=heads,
        num_query_groups=groups,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    return TransformerConfig(**(given | more))


def packing(seed: int, batch: int, seq_length: int = S) -> list[int]:
    """Boundaries of a random packing: from one document per sample to nothing but short ones."""
    rnd, cuts = random.Random(seed), {0}
    for start in range(0, batch * seq_length, seq_length):
        inside = rnd.sample(range(1, seq_length), rnd.choice([0, 1, 3, 9, 40]))
        cuts |= {start + seq_length, *(start + c for c in inside)}
    return sorted(cuts)


PACKINGS = {
    "whole": [0, S],
    "one-token": list(range(S + 1)),
    "one-token-ends": [0, 1, 2, S - 1, S],
    "chunk-edges": [0, S // 4, S // 2, 3 * S // 4, S],
    "off-edges": [0, S // 4 - 1, S // 2 + 1, S],
} | {f"random{seed}": packing(seed, 1) for seed in range(5)}


def dense(q, k, v, cuts, scale=None):
    """q [s, b, h, d], k and v [s, b, kv, d] -> [s, b, h*d] by one dense masked softmax."""
    s, b, h, d = q.shape
    q, k, v = (t.transpose(0, 1).reshape(b * s, t.size(2), d) for t in (q, k, v))
    document = torch.bucketize(torch.arange(b * s), torch.tensor(cuts[1:-1], dtype=torch.long), right=True)
    place = torch.arange(b * s)
    mask = (document[:, None] == document) & (place[:, None] >= place)
    k, v = (t.repeat_interleave(h // k.size(1), 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (d**-0.5 if scale is None else scale)
    out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
    return out.reshape(b, s, h * d).transpose(0, 1)


def tensors(heads, groups, batch, seed=0, seq_length=S, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    shapes = [(seq_length, batch, n, D) for n in (heads, groups, groups)]
    return [torch.randn(shape, dtype=dtype, generator=gen) for shape in shapes] + [
        torch.randn(seq_length, batch, heads * D, dtype=dtype, generator=gen)
    ]


def run(function, q, k, v, weight):
    """Output and gradients of sum(output * weight)."""
    q, k, v = (t.detach().clone().requires_grad_() for t in (q, k, v))
    out = function(q, k, v)
    (out * weight).sum().backward()
    return out.detach(), q.grad, k.grad, v.grad


def assert_close(ours, reference, tolerance=1e-12):
    for name, a, b in zip(("output", "dq", "dk", "dv"), ours, reference, strict=True):
        assert a.shape == b.shape, name
        assert (a - b).abs().max() < tolerance, f"{name}: {(a - b).abs().max():.1e}"


def attend(module, params):
    return lambda q, k, v: module(q, k, v, None, packed_seq_params=params)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("name", PACKINGS)
def test_equals_dense(name, groups):
    module, case = DocumentAttention(config(4, groups), 1), tensors(4, groups, 1)
    ours = run(attend(module, document_boundaries(PACKINGS[name], S)), *case)
    assert_close(ours, run(lambda *t: dense(*t, PACKINGS[name]), *case))


@pytest.mark.parametrize("seed", range(4))
def test_equals_dense_in_a_batch(seed):
    cuts, case = packing(seed, 2), tensors(4, 2, 2, seed)
    module = DocumentAttention(config(4, 2), 1, softmax_scale=0.3)
    ours = run(attend(module, document_boundaries(np.array(cuts, dtype=np.int32), S, 2)), *case)
    assert_close(ours, run(lambda *t: dense(*t, cuts, 0.3), *case))


def test_plain_packed_seq_params():
    cuts, case = packing(7, 2), tensors(4, 4, 2)
    cu = torch.tensor(cuts, dtype=torch.int32)
    plain = PackedSeqParams(qkv_format="sbhd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=S, max_seqlen_kv=S)
    module = DocumentAttention(config(), 1)
    for a, b in zip(
        run(attend(module, plain), *case),
        run(attend(module, document_boundaries(cu, S, 2)), *case),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cuts", [[0, S], [0, 7, S]])
def test_other_sdpa_backend(cuts):
    """The layout of scaled_dot_product_attention's output depends on its backend."""
    case = tensors(4, 2, 1)
    with sdpa_kernel(SDPBackend.MATH):
        ours = run(attend(DocumentAttention(config(4, 2), 1), document_boundaries(cuts, S)), *case)
    assert_close(ours, run(lambda *t: dense(*t, cuts), *case))


def test_forward_reads_the_host_copy():
    """No layer waits for the device: the boundaries' tensors are not touched."""
    cuts, case = packing(7, 2), tensors(4, 4, 2)
    params = document_boundaries(cuts, S, 2)
    params.cu_seqlens_q = params.cu_seqlens_kv = None
    assert_close(run(attend(DocumentAttention(config(), 1), params), *case), run(lambda *t: dense(*t, cuts), *case))


def test_without_boundaries_is_causal_over_samples():
    case, module = tensors(4, 2, 3), DocumentAttention(config(4, 2), 1)
    assert_close(run(attend(module, None), *case), run(lambda *t: dense(*t, [0, S, 2 * S, 3 * S]), *case))


def test_non_contiguous_inputs():
    """Megatron's q, k, v are views of one mixed projection."""
    gen = torch.Generator().manual_seed(0)
    mixed = torch.randn(S, 2, 2, 4 * D, dtype=torch.float64, generator=gen)
    q, k, v = mixed[..., : 2 * D].reshape(S, 2, 4, D), mixed[..., 2 * D : 3 * D], mixed[..., 3 * D :]
    cuts = packing(3, 2)
    out = DocumentAttention(config(4, 2), 1)(q, k, v, None, packed_seq_params=document_boundaries(cuts, S, 2))
    assert (out - dense(q, k, v, cuts)).abs().max() < 1e-12
    assert out.is_contiguous()


@pytest.mark.parametrize("batch", [1, 2])
def test_no_leak_between_documents(batch):
    """Another q, k, v, gradient in one document leaves the others' outputs and gradients bitwise the same."""
    cuts = packing(5, batch)
    start, end = max(pairwise(cuts), key=lambda c: c[1] - c[0])
    module = DocumentAttention(config(4, 2), 1)
    params = document_boundaries(cuts, S, batch)
    case = tensors(4, 2, batch, dtype=torch.float32)
    changed = [t.transpose(0, 1).flatten(0, 1).clone() for t in case]
    for t in changed:
        t[start:end] = torch.randn(t[start:end].shape)
    changed = [t.unflatten(0, (batch, S)).transpose(0, 1) for t in changed]
    for a, b in zip(run(attend(module, params), *case), run(attend(module, params), *changed), strict=True):
        a, b = (t.transpose(0, 1).flatten(0, 1) for t in (a, b))
        same = torch.ones(len(a), dtype=torch.bool)
        same[start:end] = False
        assert torch.equal(a[same], b[same])
        assert not torch.equal(a[~same], b[~same])


# The boundaries


def test_document_boundaries():
    for given in ([0, 5, 8, 16], np.array([0, 5, 8, 16]), torch.tensor([0, 5, 8, 16], dtype=torch.int32)):
        params = document_boundaries(given, 8, 2, device="cpu")
        assert isinstance(params, DocumentBoundaries) and isinstance(params, PackedSeqParams)
        assert params.boundaries == (0, 5, 8, 16) and params.seq_length == 8
        assert params.qkv_format == "sbhd" and params.max_seqlen_q == params.max_seqlen_kv == 8
        assert params.cu_seqlens_q.dtype == torch.int32 and params.cu_seqlens_kv.tolist() == [0, 5, 8, 16]
        assert params.cu_seqlens_q_padded is None and params.cu_seqlens_kv_padded is None


@pytest.mark.parametrize(
    "cuts, batch, message",
    [
        ([], 1, r"starts with \(\), not 0.*prepend"),
        ([3, 8], 1, r"starts with \(3,\), not 0.*prepend"),
        ([0, 5, 5, 8], 1, r"does not increase at 1: \(5, 5\).*empty documents"),
        ([0, 5, 8, 8, 8], 1, r"does not increase at 2: \(8, 8\).*padding"),
        ([0, 4], 1, r"ends at 4, not at batch_size 1 \* seq_length 8 = 8: pass the boundaries of the whole"),
        ([0, 8], 2, r"ends at 8, not at batch_size 2 \* seq_length 8 = 16"),
        ([0, 5, 16], 2, r"lacks 8, the start of a sample of length 8: insert it"),
        ([0, 2.5, 8], 1, r"flat sequence of integers, got \[0, 2.5, 8\]"),
        (torch.tensor([[0, 8]]), 1, r"flat sequence of integers, got \[\[0, 8\]\]"),
    ],
)
def test_document_boundaries_refuses(cuts, batch, message):
    with pytest.raises(ValueError, match=message):
        document_boundaries(cuts, 8, batch)


# Refusals


@pytest.mark.parametrize(
    "field, value",
    [
        ("multi_latent_attention", True),
        ("experimental_attention_variant", "dsa"),
        ("is_hybrid_model", True),
        ("window_size", (128, 0)),
        ("attention_dropout", 0.1),
        ("softmax_type", "learnable"),
        ("qk_clip", True),
        ("log_max_attention_logit", True),
        ("fp8_dot_product_attention", True),
        ("fp8_multi_head_attention", True),
        ("mtp_hsm", True),
        ("hybrid_context_parallel", True),
        ("cuda_graph_impl", "local"),
        ("enable_cuda_graph", True),
        ("external_cuda_graph", True),
    ],
)
def test_refuses(field, value):
    with pytest.raises(ValueError, match=f"does not support\n  {field}="):
        check_supported(SimpleNamespace(**{field: value}))
    check_supported(SimpleNamespace(**{field: None}))


def test_refuses_all_at_once():
    with pytest.raises(ValueError, match="attention_dropout=0.1: set it to 0.0\n.*\n.*mtp_hsm=True: "):
        check_supported(SimpleNamespace(attention_dropout=0.1, qk_clip=True, mtp_hsm=True))


def test_refuses_lengths():
    cp = SimpleNamespace(context_parallel_size=4, tensor_model_parallel_size=2, sequence_parallel=True)
    check_supported(cp, 64)
    with pytest.raises(ValueError, match="seq_length=60 with context_parallel_size=4: use a multiple of 8"):
        check_supported(cp, 60)
    cp.tensor_model_parallel_size = 3
    with pytest.raises(ValueError, match="sequence_parallel=True with 64/4 .* tensor_model_parallel_size=3"):
        check_supported(cp, 64)
    cp.sequence_parallel = False
    check_supported(cp, 64)
    check_supported(SimpleNamespace(), 63)
    cp.fused_single_qkv_rope = True
    with pytest.raises(ValueError, match="fused_single_qkv_rope=True"):
        check_supported(cp)
    cp.context_parallel_size = 1
    check_supported(cp)


def test_default_config_refused_by_its_dropout():
    with pytest.raises(ValueError, match="attention_dropout=0.1: set it to 0.0"):
        DocumentAttention(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1), 1)


def test_mla_config_refused():
    mla = MLATransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, attention_dropout=0.0)
    with pytest.raises(ValueError, match="multi_latent_attention=True"):
        DocumentAttention(mla, 1)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(attention_dropout=0.2), "attention_dropout': 0.2"),
        (dict(attention_type="cross"), "attention_type': 'cross'"),
        (dict(k_channels=8, v_channels=4), "'k_channels': 8, 'v_channels': 4"),
        (dict(sink=3), "does not take {'sink': 3}"),
        (dict(mode="ring"), "no mode='ring': use one of auto, ulysses, gather"),
        (dict(kernel="fast"), "no kernel='fast': use one of auto, te, varlen, sdpa"),
        (dict(attn_mask_type=AttnMaskType.no_mask), "causal, got attn_mask_type=AttnMaskType.no_mask"),
    ],
)
def test_constructor_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        DocumentAttention(config(), 1, **given)


def test_forward_refuses():
    module, (q, k, v, _) = DocumentAttention(config(), 1), tensors(4, 4, 1)
    cu = torch.tensor([0, S], dtype=torch.int32)
    with pytest.raises(ValueError, match="qkv_format='thd': build packed_seq_params with document_boundaries"):
        module(q, k, v, None, packed_seq_params=PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu))
    with pytest.raises(ValueError, match=f"boundaries of {S // 2} tokens .* came with 1 samples of {S}"):
        module(q, k, v, None, packed_seq_params=document_boundaries([0, S // 2], S // 2))
    with pytest.raises(ValueError, match="ends at"):
        module(
            q[:-2],
            k[:-2],
            v[:-2],
            None,
            packed_seq_params=PackedSeqParams(qkv_format="sbhd", cu_seqlens_q=cu),
        )
    with pytest.raises(ValueError, match="attention_bias"):
        module(q, k, v, None, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="got attn_mask_type"):
        module(q, k, v, None, attn_mask_type=AttnMaskType.padding)
    for bad in ((q[:1], k, v), (q[:, 0], k[:, 0], v[:, 0]), (q, k, v[..., :4])):
        with pytest.raises(ValueError, match=r"takes \[s, b, heads, d\]"):
            module(*bad, None)


class OneOf:
    """A context-parallel group as its constructor sees it."""

    def __init__(self, size):
        self.size = lambda: size
        self.rank = lambda: 0


@pytest.mark.parametrize(
    "heads, groups, tp, cp, mode",
    [
        (8, 8, 1, 4, "ulysses"),
        (8, 2, 1, 4, "gather"),
        (8, 8, 4, 2, "ulysses"),
        (8, 4, 4, 2, "gather"),
        (8, None, 2, 4, "ulysses"),
        (8, 4, 8, 2, "gather"),
    ],
)
def test_mode_follows_the_heads(heads, groups, tp, cp, mode):
    given = config(heads, groups, context_parallel_size=cp, tensor_model_parallel_size=tp)
    pgs = SimpleNamespace(cp=OneOf(cp))
    assert DocumentAttention(given, 1, pg_collection=pgs).mode == mode
    assert DocumentAttention(given, 1, model_comm_pgs=pgs, mode="gather").mode == "gather"
    assert DocumentAttention.with_mode("gather")(given, 1, pg_collection=pgs).mode == "gather"
    spec = ModuleSpec(DocumentAttention, params={"mode": "gather"})
    assert build_module(spec, config=given, layer_number=1, pg_collection=pgs).mode == "gather"
    if mode == "gather":
        kv = max(1, (groups or heads) // tp)
        with pytest.raises(ValueError, match=f"groups={groups} over .*size={tp} leave {kv} KV .* divide by .*={cp}:"):
            DocumentAttention(given, 1, pg_collection=pgs, mode="ulysses")


@pytest.mark.parametrize(
    "comm, mode", [(None, "ulysses"), ("p2p", "ulysses"), ("a2a", "ulysses"), ("all_gather", "gather")]
)
def test_cp_comm_type_chooses(comm, mode):
    """Megatron hands every layer the config's cp_comm_type; p2p is Megatron-LM's default, so no choice."""
    given, pgs = config(4, 4, context_parallel_size=2), SimpleNamespace(cp=OneOf(2))
    assert DocumentAttention(given, 1, pg_collection=pgs, cp_comm_type=comm).mode == mode
    assert DocumentAttention(given, 1, pg_collection=pgs, cp_comm_type=comm, mode="gather").mode == "gather"
    assert DocumentAttention(config(4, 4), 1, cp_comm_type="a2a+p2p").mode == "auto", "of no use at cp 1"
    with pytest.raises(ValueError, match="no cp_comm_type='a2a[+]p2p': use a2a or all_gather"):
        DocumentAttention(given, 1, pg_collection=pgs, cp_comm_type="a2a+p2p")
    with pytest.raises(ValueError, match="leave 1 KV heads, .* use mode='gather' [(]cp_comm_type all_gather[)]"):
        DocumentAttention(config(4, 1, context_parallel_size=2), 1, pg_collection=pgs, cp_comm_type="a2a")


def test_with_mode():
    assert DocumentAttention.with_mode("ulysses") is DocumentAttention.with_mode("ulysses")
    assert issubclass(DocumentAttention.with_mode("ulysses"), DocumentAttention)
    with pytest.raises(ValueError, match="no mode='ring'"):
        DocumentAttention.with_mode("ring")


def test_no_state():
    module = DocumentAttention(config(), 1)
    assert not module.state_dict() and not list(module.parameters())


# The chunk plan and the CUDA kernels' arguments


@pytest.mark.parametrize("cp", [2, 3, 4])
def test_chunk_plan_covers_every_document_prefix_once(cp):
    for seed in range(10):
        cuts, seen = tuple(packing(seed, 2)), []
        for rank in range(cp):
            chunks = iter(c * (S // (2 * cp)) + k * S for k in (0, 1) for c in (rank, 2 * cp - 1 - rank))
            for span, nq, nk in boundaries.chunk_plan(cuts, S, rank, cp):
                q, k = next(chunks), span.start
                for a, b in zip(nq, nk, strict=True):
                    assert k in cuts and k + b == q + a, "keys start with a document and end with the queries"
                    seen += range(q, q + a)
                    q, k = q + a, k + b
                assert k == span.stop
        assert sorted(seen) == list(range(2 * S))


def lower_right(q, k, v, nq, nk, scale):
    """What a lower-right causal varlen kernel computes."""
    out = []
    for qi, ki, vi in zip(q.split(nq), k.split(nk), v.split(nk), strict=True):
        ki, vi = (t.repeat_interleave(q.size(1) // k.size(1), 1) for t in (ki, vi))
        hidden = torch.ones(len(qi), len(ki), dtype=torch.bool).triu(len(ki) - len(qi) + 1)
        scores = torch.einsum("qhd,khd->hqk", qi, ki) * scale
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), vi))
    return torch.cat(out)


RECTANGULAR = ((3, 1, 5), (9, 1, 5))


@pytest.mark.parametrize("lengths", [((4, 1, 4), (4, 1, 4)), RECTANGULAR])
def test_sdpa_aligns_at_the_lower_right(lengths):
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(9, 4, D, dtype=torch.float64, generator=gen)
    k, v = (torch.randn(sum(lengths[1]), 2, D, dtype=torch.float64, generator=gen) for _ in range(2))
    for key, value in ((k, v), (torch.stack((k, v), 1), None)):
        ours = torch.cat(kernels._sdpa(q, key, value, *lengths, 0.5))
        assert (ours - lower_right(q, k, v, *lengths, 0.5)).abs().max() < 1e-12


def widths(cu):
    assert cu.dtype == torch.int32 and cu[0] == 0
    return tuple(cu.diff().tolist())


class TEStandIn:
    """Transformer Engine's names (2.x) and its contract for thd: K and V start at 0, if they are not declared as interleaved."""

    built: list[tuple] = []

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        tp_size=1,
        softmax_scale=None,
    ):
        self.built.append((num_attention_heads, kv_channels, num_gqa_groups, attention_dropout, tp_size))
        self.scale = softmax_scale

    def __call__(self, *args, **given):
        return self.forward(*args, **given)

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
    ):
        for t in (key_layer, value_layer):
            assert t.storage_offset() == 0 and t.is_contiguous(), "qkv memory layout is not supported"
        nq, nk = widths(cu_seqlens_q), widths(cu_seqlens_kv)
        assert (qkv_format, max_seqlen_q, max_seqlen_kv) == ("thd", max(nq), max(nk))
        assert attn_mask_type == ("padding_causal" if nq == nk else "padding_causal_bottom_right")
        return lower_right(query_layer, key_layer, value_layer, nq, nk, self.scale).flatten(1)


class TEStandIn220(TEStandIn):
    """With the argument of 2.20 that declares K and V interleaved."""

    def forward(self, query_layer=None, key_layer=None, value_layer=None, *, kv_layer=None, **given):
        if kv_layer is not None:
            assert key_layer is None and value_layer is None and kv_layer.shape[-3] == 2 and kv_layer.stride(-1) == 1
            assert kv_layer._is_view(), "declared, so not copied"
            key_layer, value_layer = (t.clone() for t in kv_layer.unbind(-3))
        return super().forward(query_layer, key_layer, value_layer, **given)


@pytest.fixture
def caches():
    for cache in (kernels.te_module, kernels._fastest_on_cuda):
        cache.cache_clear()
    yield
    for cache in (kernels.te_module, kernels._fastest_on_cuda):
        cache.cache_clear()


@pytest.mark.parametrize("te", [TEStandIn, TEStandIn220])
@pytest.mark.parametrize("lengths", [((4, 1, 4), (4, 1, 4)), RECTANGULAR])
def test_transformer_engine_arguments(monkeypatch, caches, lengths, te):
    package, pytorch = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    package.pytorch, pytorch.DotProductAttention = pytorch, te
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)
    monkeypatch.setattr(TEStandIn, "built", [])
    assert kernels._fastest_on_cuda() == "te"
    q, k = torch.randn(9, 4, D), torch.randn(sum(lengths[1]), 2, D)
    expected = lower_right(q, k, k + 1, *lengths, 0.5)
    for _ in range(2):
        (out,) = kernels._te(q, k, k + 1, *lengths, 0.5)
        assert torch.equal(out, expected)
    gathered = torch.stack([torch.cat([torch.randn(3, 2, D), t]) for t in (k, k + 1)], 1)
    (out,) = kernels._te(q, gathered[3:], None, *lengths, 0.5)
    assert torch.equal(out, expected)
    assert te.built == [(4, D, 2, 0.0, 1)]


@pytest.mark.parametrize("te", [TEStandIn, TEStandIn220])
@pytest.mark.parametrize("hopper", [True, False])
def test_deterministic_calls_on_hopper(monkeypatch, caches, te, hopper):
    """Some documents at a time, the same result; with a limit of 4 heads x 1 document x 4 x 6, and a document above it."""
    package, pytorch = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    package.pytorch, pytorch.DotProductAttention = pytorch, te
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0) if hopper else (10, 0))
    monkeypatch.setattr(kernels, "DETERMINISTIC_LIMIT", 100)
    nq, nk = (1, 2, 4, 7, 1, 1), (1, 3, 6, 9, 2, 2)
    q, k = torch.randn(sum(nq), 4, D), torch.randn(sum(nk), 2, D)
    expected = lower_right(q, k, k + 1, nq, nk, 0.5)
    gathered = torch.stack([torch.cat([torch.randn(1, 2, D), t]) for t in (k, k + 1)], 1)
    for found in (
        kernels._te(q, k, k + 1, nq, nk, 0.5),
        kernels._te(q, gathered[1:], None, nq, nk, 0.5),
    ):
        assert [len(part) for part in found] == ([3, 4, 7, 2] if hopper else [16])
        assert torch.allclose(torch.cat(found), expected)


@pytest.mark.parametrize(
    ("lengths", "heads", "sizes"),
    [
        ((32768,), 32, [1]),
        ((4096, 4096), 32, [1, 1]),
        ((4096, 4096), 8, [2]),
        ((2590,) * 5, 32, [5]),
        ((2591,) * 5, 32, [4, 1]),
        ((5793, 1, 1, 5792), 32, [1, 2, 1]),
    ],
)
def test_groups_of_documents(lengths, heads, sizes):
    """Below heads x documents x longest x longest = 2^30."""
    groups = kernels.deterministic_groups(lengths, lengths, heads)
    assert [group.stop - group.start for group in groups] == sizes


# torch's varlen_attn, recorded by inspect.signature; 2.10's lacks window_size and scale.


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("not to be called")


def varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return varlen_stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux, scale, window_size)


def varlen_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert enable_gqa == (query.size(1) != key.size(1)) and seqused_k is block_table is num_splits is None
    return varlen_stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux, scale, window_size)


def varlen_stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux, scale, window_size):
    nq, nk = widths(cu_seq_q), widths(cu_seq_k)
    assert (max_q, max_k, window_size, return_aux) == (max(nq), max(nk), (-1, 0), None)
    assert (cu_seq_q is cu_seq_k) == (nq == nk), "torch takes its cuDNN kernel for one tensor only"
    return lower_right(query, key, value, nq, nk, scale)


def install_varlen(monkeypatch, function):
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = function
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)


@pytest.mark.parametrize("varlen", [varlen_2_11, varlen_2_13])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("lengths", [((4, 1, 4), (4, 1, 4)), RECTANGULAR])
def test_varlen_arguments(monkeypatch, lengths, kv_heads, varlen):
    install_varlen(monkeypatch, varlen)
    q, k = torch.randn(9, 4, D), torch.randn(sum(lengths[1]), kv_heads, D)
    expected = lower_right(q, k, k + 1, *lengths, 0.5)
    for key, value in ((k, k + 1), (torch.stack((k, k + 1), 1), None)):
        (out,) = kernels._varlen(q, key, value, *lengths, 0.5)
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "varlen, kernel", [(None, "sdpa"), (varlen_2_10, "sdpa"), (varlen_2_11, "varlen"), (varlen_2_13, "varlen")]
)
def test_fastest_without_transformer_engine(monkeypatch, caches, varlen, kernel):
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    install_varlen(monkeypatch, varlen)
    if varlen is None:
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert kernels._fastest_on_cuda() == kernel


def test_recorded_signatures():
    """The stand-in of the torch that is here has its arguments."""
    recorded = {"2.11": varlen_2_11, "2.13": varlen_2_13}.get(".".join(torch.__version__.split(".")[:2]))
    if recorded is None:
        pytest.skip(f"torch {torch.__version__}: signatures of 2.11 and 2.13 are recorded")
    from torch.nn.attention.varlen import varlen_attn

    found, ours = (inspect.signature(f).parameters.values() for f in (varlen_attn, recorded))
    assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in ours]


# Why the stock path is not taken: the claim of the module docstring and of docs/


def stock_keys(cuts: list[int], cp: int) -> dict[int, set[int]]:
    """The tokens that each token of a sample sees if Transformer Engine's thd attention (which takes every document for a
    zigzag of its own) reads Megatron's whole-sequence zigzag batch.

    Rank r's slots are split at cu_seqlens // cp; slot i of a document on rank r is taken for its token in
    chunk r or 2*cp-1-r, and the attention is causal in those. The tokens really there are the batch's.
    """
    size = cuts[-1] // (2 * cp)

    def two_chunks(rank: int, size: int) -> list[int]:
        return [c * size + i for c in (rank, 2 * cp - 1 - rank) for i in range(size)]

    by_document: dict[int, list[tuple[int, int]]] = {}  # where a slot is taken to be in a document, and its real token
    for rank in range(cp):
        real = two_chunks(rank, size)
        for document, (a, b) in enumerate(pairwise(cuts)):
            taken_for = two_chunks(rank, (b - a) // (2 * cp))
            by_document.setdefault(document, []).extend(zip(taken_for, real[a // cp :]))
    return {
        token: {other for at, other in members if at <= place}
        for members in by_document.values()
        for place, token in members
    }


def stock_wrong_share(cuts: list[int], cp: int) -> tuple[float, float]:
    """Shares of queries with a wrong key set, and with a future key."""
    start = {t: a for a, b in pairwise(cuts) for t in range(a, b)}
    seen = stock_keys(cuts, cp)
    assert sorted(seen) == list(range(cuts[-1]))
    wrong = sum(keys != set(range(start[token], token + 1)) for token, keys in seen.items())
    future = sum(max(keys) > token for token, keys in seen.items())
    return wrong / cuts[-1], future / cuts[-1]


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_stock_context_parallelism_is_wrong_on_this_batch(cp):
    """Even for documents of lengths that Transformer Engine asks for, all divisible by 2*cp. -s prints the shares."""
    rnd = random.Random(0)
    cuts = [0, *sorted(16 * c for c in rnd.sample(range(1, 64), 6)), 1024]
    wrong, future = stock_wrong_share(cuts, cp)
    print(f"\ncp {cp}, documents at {cuts}: {wrong:.1%} of the queries see wrong keys, {future:.1%} a future token")
    assert wrong > 0.9 and future > 0.3, (wrong, future)
    assert stock_wrong_share([0, 512], cp) == (0, 0), "one document a sample: the two zigzags agree"


def test_boundaries_can_come_in_the_mask():
    """For megatron-core below 0.16, where attention takes every packed_seq_params for thd."""
    from exact_megatron.config import ExactError
    from exact_megatron.integrations.documents import MaskAttention

    cuts, case = packing(3, 2), tensors(4, 2, 2)
    ours = run(attend(DocumentAttention(config(4, 2), 1), document_boundaries(cuts, S, 2)), *case)
    in_mask = run(lambda *qkv: MaskAttention(config(4, 2), 1)(*qkv, torch.tensor(cuts)), *case)
    assert all(torch.equal(a, b) for a, b in zip(ours, in_mask))
    with pytest.raises(ExactError, match="got no document boundaries"):
        MaskAttention(config(4, 2), 1)(*case[:3], None)
