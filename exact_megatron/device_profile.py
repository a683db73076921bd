"""What a device can do at best, and where the time of a training step goes.

`exact-megatron benchmark ceiling` measures large matrix products and a copy; `benchmark throughput --profile` uses the rest.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .benchmark import Measured, Row
from .geometry import GEOMETRIES

REPEATS, WARMUP = 20, 5
TOP = 20  # kernels that a profile names
SQUARE = 8192
E4M3_MAX = 448.0

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--geometry", default="llama-3.2-1b,llama-3-8b", help="products of these models' layers too")
    parser.add_argument("--step-tokens", type=int, default=8192, help="rows of those products: tokens of a micro-batch")


def _seconds(call: Callable[[], Any], cuda: bool, repeats: int = REPEATS) -> float:
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


def product(kind: str, rows: int, inner: int, columns: int) -> dict[str, float]:
    """Time and TFLOP/s of one product of random matrices, on the GPU where there is one.

    Args:
        kind: "fp32", "bf16", or "fp8" (E4M3, one scale a tensor, fast accumulation: cuBLAS by torch._scaled_mm).

    Returns:
        {"s", "TFLOP/s"}
    """
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    # Three sets of operands in turn, so that none is found in the cache.
    sets = []
    for _ in range(3 if cuda else 1):
        a = torch.randn(rows, inner, device=device, dtype=torch.float32 if kind == "fp32" else torch.bfloat16)
        b = torch.randn(columns, inner, device=device, dtype=a.dtype)
        if kind == "fp8":
            scales = [t.abs().max().float() / E4M3_MAX for t in (a, b)]
            a, b = ((t / scale).to(torch.float8_e4m3fn) for t, scale in zip((a, b), scales))
            sets.append((a, b.t(), *scales))
        else:
            sets.append((a, b.t()))
    turn = iter(range(1 << 30))

    def call() -> Any:
        operands = sets[next(turn) % len(sets)]
        if kind != "fp8":
            return operands[0] @ operands[1]
        a, b, scale_a, scale_b = operands
        return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)

    seconds = _seconds(call, cuda)
    return {"s": seconds, "TFLOP/s": 2.0 * rows * inner * columns / seconds / 1e12}


def copy_rate(elements: int) -> float:
    """TB/s of a copy on the device, bytes read and bytes written both counted."""
    import torch

    cuda = torch.cuda.is_available()
    source = torch.randn(elements, device="cuda" if cuda else "cpu")
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / _seconds(lambda: target.copy_(source), cuda) / 1e12


def measure(args: argparse.Namespace) -> Measured:
    """Products of a large square, then of the geometries' layers; the reference is the bf16 square (fp32 on a CPU)."""
    import torch

    cuda = torch.cuda.is_available()
    for name in args.geometry.split(","):
        if name not in GEOMETRIES:
            raise ValueError(f"--geometry {name} is not one of {', '.join(GEOMETRIES)}")
    fp8 = cuda and torch.cuda.get_device_capability() >= (8, 9)
    kinds = (["bf16"] if cuda else ["fp32"]) + (["fp8"] if fp8 else [])
    square = SQUARE if cuda else 512
    reference = product(kinds[0], square, square, square)["TFLOP/s"]
    shapes = {f"square {square}": (square, square, square)}
    for name in args.geometry.split(","):
        g = GEOMETRIES[name]
        for matrix, (inner, columns) in g.layer_matrices().items():
            shapes[f"{name} {matrix}"] = (args.step_tokens, inner, columns)
        shapes[f"{name} logits"] = (args.step_tokens, g.hidden, g.vocabulary)
    rows = []
    for name, shape in shapes.items():
        for kind in kinds:
            rate = product(kind, *shape)["TFLOP/s"]
            rows.append(Row(f"{name} {kind}", rate, reference, "TFLOP/s", rate / reference, "", True))
    rate = copy_rate(1 << (29 if cuda else 22))
    rows.append(Row("copy", rate, rate, "TB/s", 1.0, "", True))
    setup = f"products [rows, inner] x [inner, columns] of random matrices, median of {REPEATS}; rows of the layers' products: "
    return {"setup": setup + f"{args.step_tokens:,} tokens; reference: the {kinds[0]} square"}, rows


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


def loss_end(trainer: Any) -> dict[str, Any]:
    """Logits and cross entropy of one micro-batch alone, forward and backward under a weight a target.

    Returns:
        {"s", "GiB": peak above what was allocated before (0 on a CPU), "others": {name: {"s", "GiB", "error"}}}; others are the
        installed kernels of FUSED_LOSS_ENDS without tensor parallelism, which no run uses, and error is ||a - b|| / ||b|| of the
        hidden states' and the weight's gradients against the run's own.
    """
    import torch

    run, model = trainer.run, trainer.model[0].module
    while not hasattr(model, "output_layer"):  # Float16Module and the like
        model = model.module
    m, cuda = run.model, trainer.device.type == "cuda"
    dtype = next(model.parameters()).dtype
    shape = (m.data.seq_length, m.micro_batch_size, m.hidden_size)
    hidden = torch.randn(shape, device=trainer.device, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, m.override_vocab_size, shape[1::-1], device=trainer.device)
    tied = m.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    target_weights = torch.rand(labels.shape, device=trainer.device) + 0.5

    def own(hidden: Any, weight: Any, labels: Any) -> Any:
        logits, _ = model.output_layer(hidden, weight=weight)
        return model.compute_language_model_loss(labels, logits)

    def gradients(losses_of: Callable[..., Any]) -> tuple[Any, ...]:
        losses = losses_of(hidden, weight, labels)
        return torch.autograd.grad((losses.float() * target_weights).sum(), [hidden, weight])

    def measured(losses_of: Callable[..., Any]) -> dict[str, float]:
        before = 0
        if cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        seconds = _seconds(lambda: gradients(losses_of), cuda, 5)
        peak = torch.cuda.max_memory_allocated() - before if cuda else 0
        return {"s": seconds, "GiB": peak / 2**30}

    found: dict[str, Any] = {**measured(own), "others": {}}
    if m.tensor_model_parallel_size > 1:
        return found
    for name, (package, losses_of) in FUSED_LOSS_ENDS.items():
        if importlib.util.find_spec(package) is None:
            continue
        pairs = zip(gradients(losses_of), gradients(own))
        error = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
        found["others"][name] = {**measured(losses_of), "error": error}
    return found
