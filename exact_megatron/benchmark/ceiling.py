"""What a device can do at best, and where the time of a training step goes.

`exact-megatron benchmark ceiling` measures large matrix products and a copy; `benchmark throughput --profile` uses the rest.
"""

from __future__ import annotations

import argparse
from typing import Any

from .geometry import GEOMETRIES
from .harness import FAILED, Measured, Row, written_at_interrupt
from .profile import REPEATS, median_seconds

SQUARE = 8192
E4M3_MAX = 448.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--geometry", default="llama-3.2-1b,llama-3-8b", help="products of these models' layers too")
    parser.add_argument("--step-tokens", type=int, default=8192, help="rows of those products: tokens of a micro-batch")


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

    seconds = median_seconds(call, cuda)
    return {"s": seconds, "TFLOP/s": 2.0 * rows * inner * columns / seconds / 1e12}


def copy_rate(elements: int) -> float:
    """TB/s of a copy on the device, bytes read and bytes written both counted."""
    import torch

    cuda = torch.cuda.is_available()
    source = torch.randn(elements, device="cuda" if cuda else "cpu")
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / median_seconds(lambda: target.copy_(source), cuda) / 1e12


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
    failed: list[str] = []
    facts: dict[str, Any] = {}
    with written_at_interrupt(facts):
        for name, shape in shapes.items():
            for kind in kinds:
                try:
                    rate = product(kind, *shape)["TFLOP/s"]
                except RuntimeError as error:  # of memory, or of a library that has no such product
                    failed.append(f"{name} {kind}: {str(error).splitlines()[0]}")
                    continue
                rows.append(Row(f"{name} {kind}", rate, reference, "TFLOP/s", rate / reference, "", True))
        rate = copy_rate(1 << (29 if cuda else 22))
        rows.append(Row("copy", rate, rate, "TB/s", 1.0, "", True))
    if failed:
        facts[FAILED] = "; ".join(failed)
    setup = f"products [rows, inner] x [inner, columns] of random matrices, median of {REPEATS}; rows of the layers' products: "
    return {"setup": setup + f"{args.step_tokens:,} tokens; reference: the {kinds[0]} square"} | facts, rows
