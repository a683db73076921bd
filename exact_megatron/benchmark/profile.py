"""Where the time of a training step goes, by groups of kernels."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

REPEATS, WARMUP = 20, 5
TOP = 20  # kernels that a profile names

# Kernel names as they come from cuBLAS (nvjet, gemm), cuDNN, Transformer Engine, Triton and torch; the first that matches.
GROUPS = {
    "attention": r"fmha|flash|sdpa|attention|_softmax_",
    "optimizer and gradient norm": r"adam|multi_tensor|foreach",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|aten::(mm|addmm|bmm|linear|matmul)\b",
    "FP8 casts and scales": r"quantize|cast|amax|transpose|fp8|block_scal|dequant",
    "norms": r"norm",
    "RoPE": r"rope|rotary",
    "copies": r"memcpy|memset|copy_",
    "softmax and cross entropy": r"cross_entropy|softmax|exp|logits",
    "communication": r"nccl|gloo|all_reduce|allreduce",
}


def median_seconds(call: Callable[[], Any], cuda: bool, repeats: int = REPEATS) -> float:
    """Median time of a call, by device events on a GPU."""
    import torch

    for _ in range(WARMUP):
        call()
    times = []
    for _ in range(repeats):
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return float(np.median(times))


def group(kernel: str) -> str:
    """Which part of a step a kernel belongs to, by its name."""
    return next(
        (name for name, pattern in GROUPS.items() if re.search(pattern, kernel, re.IGNORECASE)), "elementwise and other"
    )


def kernel_times(events: Iterable[Any], cuda: bool) -> dict[str, tuple[float, int]]:
    """{name: (seconds, calls)} of the kernels among a profiler's events; on a CPU, of the operators, without what they call.

    A GPU's profile has each kernel once as itself, once as its operator (a CPU event with the same device time), and once more
    in every user annotation around it (record_function, NVTX), which also spans the gaps between kernels: only the first counts.
    """
    from torch.autograd import DeviceType

    times: dict[str, tuple[float, int]] = {}
    for event in events:
        if event.is_user_annotation or (event.device_type == DeviceType.CPU) == cuda:
            continue
        own = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        if own > 0:
            seconds, calls = times.get(event.key, (0.0, 0))
            times[event.key] = seconds + own, calls + event.count
    return times


def kernel_table(step: Callable[[], Any], device: Any, steps: int = 2) -> dict[str, Any]:
    """Kernels of a few steps by torch's profiler.

    Returns:
        {"steps", "wall s", "device s", "groups": {name: share}, "kernels": [{name, group, share, calls, ms}]}; shares are of the
        device's busy time (of the operators' own CPU time on a CPU), calls and ms a step.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    step()
    started = time.perf_counter()
    with profile(activities=activities) as prof:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    wall = time.perf_counter() - started
    times = kernel_times(prof.key_averages(), cuda)
    busy = sum(own for own, _ in times.values())
    shares: dict[str, float] = {}
    for name, (own, _) in times.items():
        shares[group(name)] = shares.get(group(name), 0.0) + own / busy
    largest = sorted(times.items(), key=lambda item: -item[1][0])[:TOP]
    kernels = [
        {"name": n[:160], "group": group(n), "share": own / busy, "calls": calls / steps, "ms": own / steps * 1e3}
        for n, (own, calls) in largest
    ]
    ordered = dict(sorted(shares.items(), key=lambda item: -item[1]))
    return {"steps": steps, "wall s": wall / steps, "device s": busy / steps, "groups": ordered, "kernels": kernels}


def _liger(hidden: Any, weight: Any, labels: Any) -> Any:
    """Liger-Kernel (from 0.8.2 on: `token_grad_output`)."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    losses, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        hidden.transpose(0, 1).flatten(0, 1), weight, labels.flatten(), None, None, -100, 0.0, 0.0, "none"
    )
    return losses.view(labels.shape)


def _cut(hidden: Any, weight: Any, labels: Any) -> Any:
    """Apple's cut-cross-entropy; filter_eps None leaves no small gradient out (what its later releases call cce_exact)."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden.transpose(0, 1), weight, labels, reduction="none", filter_eps=None)


# Linear layer and cross entropy in one, of the whole vocabulary: hidden [s, b, h], weight [V, h], labels [b, s] -> losses [b, s].
FUSED_LOSS_ENDS = {"liger": ("liger_kernel", _liger), "cut-cross-entropy": ("cut_cross_entropy", _cut)}


class LossEnd:
    """Hidden states, labels and a weight a target of one random micro-batch, and the output layer of a trainer's model."""

    def __init__(self, trainer: Any) -> None:
        import torch

        model = trainer.model[0].module
        while not hasattr(model, "output_layer"):  # Float16Module and the like
            model = model.module
        m = trainer.run.model
        self.model = model
        self.cuda = trainer.device.type == "cuda"
        dtype = next(model.parameters()).dtype
        shape = (m.data.seq_length, m.micro_batch_size, m.hidden_size)
        self.hidden = torch.randn(shape, device=trainer.device, dtype=dtype, requires_grad=True)
        self.labels = torch.randint(0, m.override_vocab_size, shape[1::-1], device=trainer.device)
        tied = m.share_embeddings_and_output_weights
        self.weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
        self.target_weights = torch.rand(self.labels.shape, device=trainer.device) + 0.5

    def own(self, hidden: Any, weight: Any, labels: Any) -> Any:
        """The run's own losses[b, s]."""
        logits, _ = self.model.output_layer(hidden, weight=weight)
        return self.model.compute_language_model_loss(labels, logits)

    def gradients(self, losses_of: Callable[..., Any]) -> tuple[Any, ...]:
        """Of the weighted sum of the losses, in the hidden states and the output weight."""
        import torch

        losses = losses_of(self.hidden, self.weight, self.labels)
        return torch.autograd.grad((losses.float() * self.target_weights).sum(), [self.hidden, self.weight])

    def unfused(self) -> tuple[Any, ...]:
        """The run's own gradients; a fused weight gradient goes to DDP's sums, and autograd gets a placeholder."""
        layer = self.model.output_layer
        fused = getattr(layer, "gradient_accumulation_fusion", False)
        layer.gradient_accumulation_fusion = False
        try:
            return self.gradients(self.own)
        finally:
            layer.gradient_accumulation_fusion = fused

    def measured(self, losses_of: Callable[..., Any]) -> dict[str, float]:
        """{"s", "GiB"} of forward and backward."""
        import torch

        before = 0
        if self.cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        seconds = median_seconds(lambda: self.gradients(losses_of), self.cuda, 5)
        peak = torch.cuda.max_memory_allocated() - before if self.cuda else 0
        return {"s": seconds, "GiB": peak / 2**30}


def loss_end(trainer: Any) -> dict[str, Any]:
    """Logits and cross entropy of one micro-batch alone, forward and backward under a weight a target.

    Returns:
        {"s", "GiB": peak above what was allocated before (0 on a CPU), "others": {name: {"s", "GiB", "error"}}}; others are the
        installed kernels of FUSED_LOSS_ENDS without tensor parallelism, which no run uses, and error is ||a - b|| / ||b|| of the
        hidden states' and the weight's gradients against the run's own.
    """
    end = LossEnd(trainer)
    found: dict[str, Any] = {**end.measured(end.own), "others": {}}
    if trainer.run.model.tensor_model_parallel_size > 1:
        return found
    for name, (package, losses_of) in FUSED_LOSS_ENDS.items():
        if importlib.util.find_spec(package) is None:
            continue
        pairs = zip(end.gradients(losses_of), end.unfused())
        error = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
        found["others"][name] = {**end.measured(losses_of), "error": error}
    return found
