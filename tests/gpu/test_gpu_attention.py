"""The CUDA kernels of DocumentAttention against one document at a time in float32."""

import pytest
import torch

from exact_megatron.attention import kernels

LENGTHS = [(700, 3, 1000, 345), (1, 2, 2045), (2048,), (512, 1, 1, 1534)]
SHAPES = [(32, 8, 64), (32, 8, 128), (9, 3, 64), (16, 16, 128)]  # heads, KV heads, channels; 9 and 3 are SmolLM2-135M's


def one_at_a_time(q, k, v, lengths):
    """Every document alone, by the definition, in the inputs' precision."""
    pieces, start = [], 0
    for n in lengths:
        part = slice(start, start + n)
        qi, ki, vi = (t[part].transpose(0, 1) for t in (q, k, v))
        ki, vi = (t.repeat_interleave(q.size(1) // k.size(1), 0) for t in (ki, vi))
        scores = qi @ ki.transpose(1, 2) / q.size(2) ** 0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
        pieces.append((scores.softmax(-1) @ vi).transpose(0, 1))
        start += n
    return torch.cat(pieces)


def errors(kernel, lengths, shape, device, dtype):
    """Relative errors of output and gradients, ||a - b|| / ||b||; inputs in `dtype`, the reference in float64 or float32."""
    heads, kv_heads, channels = shape
    total = sum(lengths)
    torch.manual_seed(total + heads)
    inputs = [
        torch.randn(total, n, channels, device=device).to(dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)
    ]
    exact = [t.detach().float().requires_grad_() for t in inputs]
    out = torch.cat(kernels.KERNEL_FUNCTIONS[kernel](*inputs, lengths, lengths, None))
    reference = one_at_a_time(*exact, lengths)
    gradient = torch.randn_like(reference)
    out.backward(gradient.to(dtype))
    reference.backward(gradient)
    pairs = [(out.detach(), reference.detach()), *((a.grad, b.grad) for a, b in zip(inputs, exact))]
    return {name: float((a.float() - b).norm() / b.norm()) for name, (a, b) in zip(("out", "dq", "dk", "dv"), pairs)}


def test_reference_on_a_cpu():
    found = errors("sdpa", (7, 1, 24, 32), (4, 2, 16), "cpu", torch.float32)
    assert max(found.values()) < 1e-5, found


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "heads{}_kv{}_d{}".format(*s))
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda n: "_".join(map(str, n)))
@pytest.mark.parametrize("kernel", ["te", "varlen", "sdpa"])
def test_kernel_against_one_document_at_a_time(kernel, lengths, shape, record):
    module = {"te": "transformer_engine.pytorch", "varlen": "torch.nn.attention.varlen"}.get(kernel)
    if module:
        pytest.importorskip(module)
    found = errors(kernel, lengths, shape, "cuda", torch.bfloat16)
    record(**found)
    assert max(found.values()) < 2e-2, found


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["te", "varlen"])
def test_documents_do_not_see_each_other(kernel):
    """Bitwise: what another document holds changes nothing."""
    lengths = (300, 500, 224)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1024, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    before = torch.cat(kernels.KERNEL_FUNCTIONS[kernel](q, k, v, lengths, lengths, None))
    k, v = (torch.cat([t[:300], torch.randn_like(t[300:800]), t[800:]]) for t in (k, v))
    after = torch.cat(kernels.KERNEL_FUNCTIONS[kernel](q, k, v, lengths, lengths, None))
    assert torch.equal(before[:300], after[:300]) and torch.equal(before[800:], after[800:])
    assert not torch.equal(before[300:800], after[300:800])
