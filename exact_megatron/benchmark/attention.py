"""`exact-megatron benchmark attention`: what the two ways through context parallelism cost.

* A cost model: bytes that leave a rank, and how evenly the attention work is spread over the ranks for documents as packed.
* Time and error of the kernel calls that each rank makes, ranks one after another on one device, without communication.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..packing import read_index
from .geometry import Shape
from .harness import SEED, Measured, Row, interleaved
from .synthetic import document_lengths

if TYPE_CHECKING:
    from .attention_emulation import Call, Emulation

Lengths = tuple[int, ...]
BYTES = {"bf16": 2, "fp32": 4}
ERROR_BARS = {"bf16": 2e-2, "fp32": 1e-5}
PARTS = ("cost", "time")
MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seq-length", type=int, default=4096, help="window before context parallelism cuts it")
    parser.add_argument("--batch", type=int, default=1, help="samples in a micro-batch")
    parser.add_argument("--heads", type=int, default=8, help="query heads of the model")
    parser.add_argument("--kv-heads", type=int, default=8, help="key/value heads of the model")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=BYTES, help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size: a rank has its share of the heads")
    parser.add_argument("--cp", default="2,4,8", help="context-parallel sizes")
    parser.add_argument("--prefix", help="take the documents' lengths from PREFIX.idx; default: log-normal ones")
    parser.add_argument("--samples", type=int, default=256, help="micro-batches that the work is averaged over")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, each on another micro-batch")
    parser.add_argument("--kernel", default="auto", help="auto, te, varlen or sdpa")
    parser.add_argument("--only", choices=PARTS, help="one part; default: both")


def read_shape(args: argparse.Namespace, dtype: str) -> tuple[Shape, list[int]]:
    """The layer and the context-parallel sizes.

    Raises:
        ValueError: sizes that do not divide, or --cp that is no list of sizes from 2 on.
    """
    try:
        sizes = [int(part) for part in args.cp.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 2:
        raise ValueError(f"--cp {args.cp}: give sizes from 2 on, like 2,4,8")
    for name, value, divisor in (
        ("--heads", args.heads, args.tp),
        ("--kv-heads", args.kv_heads, args.tp),
        ("--heads", args.heads, args.kv_heads),
        *(("--seq-length", args.seq_length, 2 * cp) for cp in sizes),
    ):
        if value % divisor:
            raise ValueError(f"{name} {value} must be a multiple of {divisor}")
    heads, kv_heads = args.heads // args.tp, args.kv_heads // args.tp
    return Shape(args.seq_length, args.batch, heads, kv_heads, args.head_dim, BYTES[dtype]), sizes


def packings(lengths: np.ndarray, seq_length: int, batch: int, count: int) -> list[Lengths]:
    """Documents' boundaries [0, ..., batch * S] in `count` micro-batches of documents in random order, end to end.

    Args:
        lengths: int[documents], tokens per document.

    Raises:
        ValueError: the documents do not fill one sample.
    """
    rng = np.random.default_rng(SEED)
    ends = np.cumsum(lengths[rng.permutation(len(lengths))], dtype=np.int64)
    samples = int(ends[-1]) // seq_length
    if samples < 1:
        raise ValueError(
            f"{int(ends[-1]):,} tokens do not fill one sample of {seq_length:,}: use a shorter --seq-length"
        )
    drawn = rng.choice(samples, (count, batch), replace=samples < count * batch)

    def cuts(samples: Sequence[int]) -> Lengths:
        found: list[int] = []
        for k, start in enumerate(int(sample) * seq_length for sample in samples):
            inside = ends[slice(*np.searchsorted(ends, (start + 1, start + seq_length)))]
            found += [k * seq_length, *(np.unique(inside) - start + k * seq_length).tolist()]
        return (*found, len(samples) * seq_length)

    return [cuts(samples) for samples in drawn]


def rank_work(cuts: Lengths, seq_length: int, cp: int) -> np.ndarray:
    """Query-key pairs int64[cp] that each rank of "gather" attends, a head; in "ulysses" each rank has their mean."""
    from ..attention.boundaries import chunk_plan

    work = np.zeros(cp, np.int64)
    for rank in range(cp):
        for _, queries, keys in chunk_plan(cuts, seq_length, rank, cp):
            work[rank] += sum(q * k - q * (q - 1) // 2 for q, k in zip(queries, keys, strict=True))
    return work


def cost_rows(shape: Shape, sizes: Sequence[int], micro_batches: Sequence[Lengths]) -> list[Row]:
    rows = []
    for cp in sizes:
        own = shape.local_bytes(cp, 2 * shape.heads + 2 * shape.kv_heads)
        work = np.array([rank_work(cuts, shape.seq_length, cp) for cuts in micro_batches])
        mean = float(work.mean(1).mean())
        for mode in shape.modes(cp):
            sent = shape.sent_bytes(mode, cp)
            rows.append(Row(f"cp {cp} {mode}: sent", sent / MIB, own / MIB, "MiB", sent / own, "", True))
            # the ranks wait for each other in every layer of every micro-batch
            slowest = mean if mode == "ulysses" else float(work.max(1).mean())
            rows.append(Row(f"cp {cp} {mode}: work", slowest / 1e6, mean / 1e6, "M pairs", slowest / mean, "", True))
    return rows


def time_rows(
    emulation: Emulation, sizes: Sequence[int], micro_batches: Sequence[Lengths], repeats: int, bar: float
) -> list[Row]:
    from .attention_emulation import kernel_calls, relative_error

    shape = emulation.shape
    rounds = micro_batches[:repeats]
    cases = [(mode, cp) for cp in sizes for mode in shape.modes(cp)]

    def calls(mode: str, cp: int, rank: int) -> list[list[Call]]:
        return [kernel_calls(shape, cuts, mode, cp, rank) for cuts in rounds]

    arms = {("ulysses", 1, 0): emulation.arm(calls("ulysses", 1, 0))}
    for mode, cp in cases:  # in ulysses all ranks make the same call, so one stands for all
        for rank in range(cp if mode == "gather" else 1):
            arms[mode, cp, rank] = emulation.arm(calls(mode, cp, rank))
    names = {f"{mode} {cp} {rank}": arm for (mode, cp, rank), arm in arms.items()}
    interleaved(names, 1)
    seconds = interleaved(names, repeats)
    one = seconds["ulysses 1 0"] * 1e3

    (whole,) = kernel_calls(shape, rounds[0], "ulysses", 1, 0)
    reference = emulation.reference(whole)
    unsplit = relative_error(emulation.together([[whole]]), reference)
    rows = []
    for mode, cp in cases:
        ranks = [seconds[f"{mode} {cp} {rank}"] * 1e3 for rank in range(cp) if f"{mode} {cp} {rank}" in seconds]
        own, share = float(np.median(np.max(ranks, 0))), float(np.median(one / cp))
        rows.append(Row(f"cp {cp} {mode}: time", own, share, "ms", own / share, "", True))
        every = [kernel_calls(shape, rounds[0], mode, cp, rank) for rank in range(cp)]
        error = relative_error(emulation.together(every), reference)
        ratio = error / unsplit if unsplit else 1.0
        rows.append(Row(f"cp {cp} {mode}: error", error, unsplit, "of max", ratio, f"own <= {bar:g}", error <= bar))
    return rows


def measure(args: argparse.Namespace) -> Measured:
    """Cost model, and emulated time and error, for each way and context-parallel size."""
    import torch

    from .attention_emulation import Emulation

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    shape, sizes = read_shape(args, dtype)
    needed = 2 * args.samples * args.batch * args.seq_length // int(document_lengths(10000).mean()) + 1000
    lengths = read_index(args.prefix).lengths if args.prefix else document_lengths(needed)
    micro_batches = packings(np.asarray(lengths), args.seq_length, args.batch, max(args.samples, args.repeats))
    segments = np.concatenate([np.diff(cuts) for cuts in micro_batches])
    source = f"lengths of {args.prefix}.idx" if args.prefix else "synthetic, log-normal"
    setup = [
        f"window {shape.seq_length:,}, micro-batch {shape.batch}, {args.heads} heads and {args.kv_heads} KV heads of {shape.head_dim} over "
        f"tp {args.tp}, {dtype}; {len(micro_batches)} micro-batches of documents in random order ({source}): {len(segments):,} segments, "
        f"median {int(np.median(segments)):,}, mean {segments.mean():,.0f}"
    ]
    rows = []
    if args.only != "time":
        rows += cost_rows(shape, sizes, micro_batches)
        setup += [
            "sent: bytes that leave a rank in forward and backward of a layer (model; reference: the rank's own q, k, v and output once)",
            "work: query-key pairs a head of the slowest rank, mean over micro-batches (model; reference: mean over the ranks)",
        ]
    if args.only != "cost":
        emulation = Emulation(shape, {2: torch.bfloat16, 4: torch.float32}[shape.itemsize], device, args.kernel)
        rows += time_rows(emulation, sizes, micro_batches, args.repeats, ERROR_BARS[dtype])
        setup += [
            f"time: EMULATED, no communication: ranks one after another on this one device ({device.type}, kernel {emulation.kernel}, "
            f"{torch.get_num_threads()} threads), forward and backward of their kernel calls alone, slowest rank, median of "
            f"{args.repeats} rounds (reference: the same at cp 1, divided by cp)",
            "error: output, dq, dk, dv of all emulated ranks against torch's in higher precision (reference: the kernel's at cp 1)",
        ]
    rows.sort(key=lambda row: (row.name.split()[1].zfill(9), "gather" in row.name))
    return {"setup": "; ".join(setup)}, rows
