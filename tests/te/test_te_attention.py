"""DocumentAttention through Transformer Engine's own Python: its checks, masks and autograd, around stand-ins for its two kernels."""

from __future__ import annotations

import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from exact_megatron.attention import DocumentAttention, context_parallel, document_boundaries
from exact_megatron.attention import kernels as attention_kernels
from tests.distributed.test_attention_cp import zigzag
from tests.te.thread_ranks import COLLECTIVES, Group
from tests.unit.attention.test_attention import (
    D,
    S,
    assert_close,
    attend,
    config,
    dense,
    lower_right,
    packing,
    run,
    tensors,
)

pytestmark = pytest.mark.te

# Strides of a token, a head and a channel that a layout declares, in units of heads * channels, channels and 1.
STRIDES = {"thd": (1, 1), "t2hd": (2, 1), "t3hd": (3, 1), "th2d": (2, 2), "th3d": (3, 3)}


def documents(q, k, v, cu_q, cu_k, scale, lower: bool):
    """By the mask that Transformer Engine asks its kernel for."""
    nq, nk = (tuple(cu.diff().tolist()) for cu in (cu_q, cu_k))
    if lower:
        return lower_right(q, k, v, nq, nk, scale)
    assert nq == nk, "padding_causal is aligned at the upper left"
    return lower_right(q, k, v, nq, nq, scale)


class Kernels:
    """In place of cuDNN: what it was asked for, and the same in float64."""

    def __init__(self) -> None:
        self.layouts: set[str] = set()
        self.masks: set[str] = set()
        self.detected: list[bool] = []  # for every layout that was detected: without a copy
        self.backward = 0

    def check(self, q, k, v, layout) -> None:
        from transformer_engine.pytorch.cpp_extensions.fused_attn import QKVLayout

        name = next(n for n, value in QKVLayout.items() if value == layout)
        self.layouts.add(name)
        parts = name.split("_")
        parts = parts * 3 if len(parts) == 1 else [parts[0], *parts[1:] * (3 - len(parts) + 1)][:3]
        for t, part in zip((q, k, v), parts, strict=True):
            token, head = STRIDES[part]
            assert t.stride() == (token * t.size(1) * t.size(2), head * t.size(2), 1), (name, t.shape, t.stride())

    def forward(
        self,
        max_q,
        max_k,
        training,
        scale,
        dropout,
        fast_zero_fill,
        layout,
        o_format,
        scale_format,
        bias_type,
        mask,
        softmax,
        window,
        lower,
        cu_q,
        cu_k,
        q,
        k,
        v,
        *rest,
    ):
        self.check(q, k, v, layout)
        self.masks.add(str(mask).rsplit(".", 1)[-1])
        assert (dropout, tuple(window)) == (0.0, (-1, 0)) and lower == ("BOTTOM_RIGHT" in str(mask))
        for cu, longest, tokens in ((cu_q, max_q, len(q)), (cu_k, max_k, len(k))):
            assert cu.dtype == torch.int32 and cu[-1] == tokens and cu.diff().max() == longest
        out = documents(*(t.double() for t in (q, k, v)), cu_q, cu_k, scale, lower).to(q.dtype)
        return [out, torch.zeros(len(q), q.size(1), 1), torch.zeros(2, dtype=torch.int64)]

    def backward_(
        self,
        max_q,
        max_k,
        scale,
        dropout,
        fast_zero_fill,
        layout,
        o_format,
        do_format,
        dqkv_layout,
        scale_format,
        do_scale_format,
        bias_type,
        mask,
        softmax,
        window,
        lower,
        deterministic,
        cu_q,
        cu_k,
        q,
        k,
        v,
        o,
        grad,
        *rest,
    ):
        self.check(q, k, v, layout)
        self.backward += 1
        exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
        with torch.enable_grad():
            out = documents(*exact, cu_q, cu_k, scale, lower)
        grads = torch.autograd.grad(out, exact, grad.view(q.shape).double())
        return [*(g.to(q.dtype) for g in grads), None, None]


@pytest.fixture
def kernels(te, monkeypatch):
    import transformer_engine.pytorch.attention.dot_product_attention.utils as utils
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

    found = Kernels()
    monkeypatch.setattr(tex, "get_fused_attn_backend", lambda *a, **k: (FusedAttnBackend["F16_arbitrary_seqlen"], ""))
    monkeypatch.setattr(tex, "fused_attn_fwd", found.forward)
    monkeypatch.setattr(tex, "fused_attn_bwd", found.backward_)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "default_generators", (torch.Generator(),))
    detect = utils.get_qkv_layout

    def get_qkv_layout(q, k, v, **given):
        layout, *rest = detect(q, k, v, **given)
        found.detected.append(all(a is b for a, b in zip((q, k, v), rest)))
        return layout, *rest

    monkeypatch.setattr(utils, "get_qkv_layout", get_qkv_layout)
    monkeypatch.setattr(context_parallel, "dist", COLLECTIVES)
    one_at_a_time = threading.Lock()  # a module of Transformer Engine belongs to one rank, here to all threads

    def locked(*args, **given):
        with one_at_a_time:
            return te_kernel(*args, **given)

    te_kernel = attention_kernels._te
    monkeypatch.setitem(attention_kernels.KERNEL_FUNCTIONS, "te", locked)
    attention_kernels.te_module.cache_clear()
    yield found
    attention_kernels.te_module.cache_clear()


def run_ranks(cp: int, mode: str, heads: int, groups: int, params, case, **more):
    """Output, dq, dk, dv of each rank."""
    group = Group(cp)
    modules = [
        DocumentAttention(
            config(heads, groups, context_parallel_size=cp),
            1,
            pg_collection=SimpleNamespace(cp=group),
            mode=mode,
            kernel="te",
            **more,
        )
        for _ in range(cp)
    ]

    def rank():
        cut = partial(zigzag, rank=group.rank(), cp=cp, dim=0)
        return run(attend(modules[group.rank()], params), *((t if cp == 1 else cut(t)) for t in case))

    return group.run(rank)


WAYS = [(1, "auto"), (2, "ulysses"), (2, "gather"), (4, "ulysses"), (4, "gather")]
SHAPES = [(8, 8), (8, 4), (4, 4)]  # heads, KV heads: multi-head attention and grouped-query attention


@pytest.mark.parametrize("heads, groups", SHAPES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cp, mode", WAYS)
def test_equals_dense(kernels, cp, mode, batch, heads, groups):
    """Output and gradients against dense masked attention in float64, of the same bf16 values."""
    cuts = packing(4 + batch, batch)
    case = [t.bfloat16() for t in tensors(heads, groups, batch)]
    ours = run_ranks(cp, mode, heads, groups, document_boundaries(cuts, S, batch), case, softmax_scale=0.3)
    reference = run(lambda *t: dense(*t, cuts, 0.3), *(t.double() for t in case))
    for rank, found in enumerate(ours):
        theirs = reference if cp == 1 else [zigzag(t, rank, cp, 0) for t in reference]
        assert_close([t.double() for t in found], theirs, 0.06)
    gathered = mode == "gather"
    assert kernels.layouts == {"thd_t2hd" if gathered else "thd_thd_thd"}
    assert ("NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK" in kernels.masks) == gathered
    assert kernels.backward == cp * (2 * batch if gathered else 1)
    assert all(kernels.detected) and bool(kernels.detected) != gathered, "gather declares its layout; no copies"


@pytest.mark.parametrize("cp, mode", WAYS)
def test_deterministic_groups_equal_dense(kernels, monkeypatch, cp, mode):
    """On Hopper, with a limit that leaves a call few documents: Transformer Engine's layout check accepts every group."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(attention_kernels, "DETERMINISTIC_LIMIT", 1000)
    cuts, case = packing(5, 1), [t.bfloat16() for t in tensors(8, 4, 1)]
    ours = run_ranks(cp, mode, 8, 4, document_boundaries(cuts, S, 1), case)
    reference = run(lambda *t: dense(*t, cuts), *(t.double() for t in case))
    for rank, found in enumerate(ours):
        theirs = reference if cp == 1 else [zigzag(t, rank, cp, 0) for t in reference]
        assert_close([t.double() for t in found], theirs, 0.06)
    assert kernels.backward > cp * (2 if mode == "gather" else 1) and all(kernels.detected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cp", [2, 4])
def test_gather_before_packed_inputs(kernels, monkeypatch, cp, batch):
    """Without `kv_layer` (older versions) Transformer Engine's layout check accepts the copies."""
    arguments = attention_kernels._arguments
    monkeypatch.setattr(attention_kernels, "_arguments", lambda function: arguments(function) - {"kv_layer"})
    cuts, case = packing(7, batch), [t.bfloat16() for t in tensors(4, 2, batch)]
    ours = run_ranks(cp, "gather", 4, 2, document_boundaries(cuts, S, batch), case)
    reference = run(lambda *t: dense(*t, cuts), *(t.double() for t in case))
    for rank, found in enumerate(ours):
        assert_close([t.double() for t in found], [zigzag(t, rank, cp, 0) for t in reference], 0.06)
    assert kernels.layouts == {"thd_thd_thd"} and kernels.detected == [True] * (2 * batch * cp)


def test_parts_of_one_buffer_are_rejected(kernels):
    """Why gather declares its layout; were this to pass one day, the copies for old versions could go."""
    q, k, v = torch.randn(8, 2, D).bfloat16(), *torch.randn(2, 16, 2, D).bfloat16()[:, 8:]
    with pytest.raises(RuntimeError, match="qkv memory layout is not supported"):
        attention_kernels._te(q, k, v, (8,), (8,), None)


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rotated", [True, False])
def test_views_of_megatrons_projection(kernels, batch, heads, groups, rotated):
    """Megatron's q, k, v are views of one projection; RoPE makes new q and k."""
    torch.manual_seed(0)
    per = heads // groups
    mixed = torch.randn(S, batch, groups, (per + 2) * D).bfloat16()

    def split(mixed):
        q, k, v = mixed.split([per * D, D, D], 3)
        q = q.reshape(S, batch, heads, D)
        return (q * 1, k * 1, v) if rotated else (q, k, v)

    cuts, found = packing(2, batch), []
    module = DocumentAttention(config(heads, groups), 1, kernel="te")
    params = document_boundaries(cuts, S, batch)
    for function, dtype in ((attend(module, params), torch.bfloat16), (lambda *t: dense(*t, cuts), torch.float64)):
        leaf = mixed.detach().clone().to(dtype).requires_grad_()
        out = function(*split(leaf))
        (out * torch.linspace(-1, 1, out.size(2), dtype=dtype)).sum().backward()
        found.append((out.detach().double(), leaf.grad.double()))
    for ours, theirs in zip(*found):
        assert (ours - theirs).abs().max() < 0.06


@pytest.mark.parametrize("cp", [2, 4])
def test_gather_keeps_the_local_keys_and_values(kernels, monkeypatch, cp):
    """The gathered ones are freed after the forward, gathered once more in backward, and freed again."""
    gather, living = context_parallel._gather, [[] for _ in range(cp)]

    def watch(k, v, group):
        every = gather(k, v, group)
        living[group.rank()].append(StorageWeakRef(every.untyped_storage()))
        return every

    monkeypatch.setattr(context_parallel, "_gather", watch)
    group = Group(cp)
    params = document_boundaries(packing(2, 2), S, 2)
    case = [t.bfloat16() for t in tensors(4, 2, 2)]

    def rank():
        q, k, v, w = (zigzag(t, group.rank(), cp, 0) for t in case)
        q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
        given = config(4, 2, context_parallel_size=cp)
        module = DocumentAttention(given, 1, pg_collection=SimpleNamespace(cp=group), mode="gather", kernel="te")
        out = module(q, k, v, None, packed_seq_params=params)
        refs = living[group.rank()]
        assert len(refs) == 1 and refs[0].expired(), "the gathered K/V outlive the forward"
        (out * w).sum().backward()
        assert len(refs) == 2 and refs[1].expired()

    group.run(rank)


def test_fastest_is_transformer_engine(te):
    attention_kernels._fastest_on_cuda.cache_clear()
    assert attention_kernels._fastest_on_cuda() == "te"
    attention_kernels._fastest_on_cuda.cache_clear()


@pytest.mark.parametrize("heads, groups", SHAPES)
@pytest.mark.parametrize("lengths", [((4, 1, 4), (4, 1, 4)), ((3, 1, 5), (9, 1, 5))])
@pytest.mark.parametrize("interleaved", [False, True])
def test_real_varlen(te, heads, groups, lengths, interleaved):
    """torch's own varlen_attn, forward and backward, on tensors without data."""
    q = torch.empty(9, heads, D, device="meta", dtype=torch.bfloat16, requires_grad=True)
    kv = torch.empty(sum(lengths[1]), 2, groups, D, device="meta", dtype=torch.bfloat16, requires_grad=True)
    k, v = (kv, None) if interleaved else kv.unbind(1)
    (out,) = attention_kernels._varlen(q, k, v, *lengths, None)
    out.sum().backward()
    assert out.shape == q.grad.shape == q.shape and kv.grad.shape == kv.shape
