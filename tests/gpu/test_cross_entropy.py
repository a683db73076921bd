"""Cross entropies that a weighted loss may be given to: the gradient of each target must be scaled by its own weight."""

import pytest
import torch


def relative_error(call, device, dtype, contiguous):
    """||a - b|| / ||b|| of the logits' gradient under a weight a target, against torch's; logits [s, b, v], targets [s, b]."""
    torch.manual_seed(0)
    logits = torch.randn(64, 2, 512, device=device).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    target = torch.randint(0, 512, (64, 2), device=device)
    weight = torch.rand(2, 64, device=device) + 0.5
    weight = weight.t().contiguous() if contiguous else weight.t()
    # The gradient that reaches the losses is `weight` itself, in its own memory layout.
    call(logits, target).backward(weight)
    own = torch.nn.functional.cross_entropy(exact.flatten(0, 1), target.flatten(), reduction="none")
    own.view(64, 2).backward(weight.double())
    return float((logits.grad.double() - exact.grad).norm() / exact.grad.norm())


def plain(logits, target):
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
    return losses.view(target.shape)


@pytest.mark.parametrize("contiguous", [True, False])
def test_the_check_itself(contiguous):
    assert relative_error(plain, "cpu", torch.float32, contiguous) < 1e-6

    # Transformer Engine 2.2 to 2.7: every target by the first one's gradient.
    def first(logits, target):
        return _FirstGradient.apply(plain(logits, target))

    assert relative_error(first, "cpu", torch.float32, contiguous) > 0.1

    # 2.8 to 2.10: the gradient's memory read as if it were contiguous.
    def memory(logits, target):
        return _ReadAsContiguous.apply(plain(logits, target))

    assert (relative_error(memory, "cpu", torch.float32, contiguous) < 1e-6) == contiguous


class _FirstGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, losses):
        return losses.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient[0, 0].expand_as(gradient)


class _ReadAsContiguous(_FirstGradient):
    @staticmethod
    def backward(ctx, gradient):
        return torch.as_strided(gradient, gradient.shape, (gradient.size(1), 1))


@pytest.mark.gpu
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_transformer_engine(dtype, contiguous, record):
    """The installed version; cross_entropy_fusion_impl=te is refused before 2.11 (supported.py: unsupported_loss)."""
    te = pytest.importorskip("transformer_engine")
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    error = relative_error(lambda x, y: parallel_cross_entropy(x, y), "cuda", dtype, contiguous)
    record(version=te.__version__, error=error)
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_megatron_core_native_fusion(contiguous, record):
    """cross_entropy_loss_fusion with megatron-core's own implementation."""
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    from exact_megatron.utils.ranks import be_single_rank

    if not torch.distributed.is_initialized():
        be_single_rank()
        torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        group = parallel_state.get_tensor_model_parallel_group()

        def call(x, y):
            return fused_vocab_parallel_cross_entropy(x, y, group)

        error = relative_error(call, "cuda", torch.bfloat16, contiguous)
    finally:
        parallel_state.destroy_model_parallel()
    record(error=error)
    assert error < 1e-2
