"""`exact-megatron plan`: layout, memory, tokens and hours of a run before it is started.

Runs on a login node: no torch, no GPU. Memory is an estimate (see memory.py); speed is the user's figure or a measured one.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from .allocation import WeightTable
from .blend import stored_order
from .determinism import CUDNN, attention_workspace
from .exposure import ExposureCensus
from .memory import ALLOCATOR, GIB, OVERHEAD, PARTS, attention_widths, linear_parameters, memory, parameters
from .packing import piece_histogram, read_index

if TYPE_CHECKING:
    from .training.schema import RunConfig

GPU_MEMORY = 79.0  # GiB of an H100 80 GB that torch can use: it reports about 79.1 for an 80 GB part
# Dense TFLOP/s of an H100 SXM: half of the 1,979 and 3,958 with sparsity that NVIDIA's data sheet prints.
PEAK_TFLOPS = {"bf16": 989.5, "fp8": 1979.0}
UNCOUNTED_STEPS = 3  # of a measured run, at its start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stage", metavar="FILE", action="append", help="YAML over --config; given again, one more stage of a chain"
    )
    parser.add_argument("--nodes", type=int, help="default: trainer.num_nodes")
    parser.add_argument("--gpus-per-node", type=int, help="default: trainer.devices")
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help=f"default: {GPU_MEMORY:g}, an H100 80 GB; none on a CPU"
    )
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--mfu", type=float, help="model FLOP utilisation to expect, 0..1; there is no default")
    speed.add_argument("--tokens-per-second-per-gpu", type=float, metavar="T", help="speed to expect")
    speed.add_argument("--measured", metavar="RUN", help="folder of a run, whose FLOP/s are taken over")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU, dense; default: H100 SXM, 989.5 bf16, 1979 FP8")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")


def run(args: argparse.Namespace) -> int:
    """Print the plan; 1 when a stage does not fit into a GPU's memory.

    Raises:
        ValueError: settings that do not fit together, see training/config.py, or options out of range.
    """
    from .training.config import load_config

    overrides = list(args.overrides)
    for key, value in (("trainer.num_nodes", args.nodes), ("trainer.devices", args.gpus_per_node)):
        if value is not None:
            overrides.append(f"{key}={value}")
    for option in ("mfu", "tokens_per_second_per_gpu", "peak_tflops", "gpu_memory"):
        value = getattr(args, option)
        if value is not None and not (0 < value <= 1 if option == "mfu" else value > 0):
            raise ValueError(
                f"--{option.replace('_', '-')} {value:g} must be above 0" + " and at most 1" * (option == "mfu")
            )
    runs = [load_config([*(args.config or []), *layer], overrides) for layer in ([f] for f in args.stage or [])]
    names = [Path(file).stem for file in args.stage or []]
    if not runs:
        runs, names = [load_config(args.config, overrides)], ["run"]
    measured = read_measured(args.measured) if args.measured else None
    stages = [plan_stage(name, r, args, measured) for name, r in zip(names, runs)]
    hours = [s["hours"] for s in stages]
    result = {
        "stages": stages,
        "fits": all(s["memory"]["fits"] for s in stages),
        "hours": None if None in hours else sum(hours),
        "gpu_hours": None if None in hours else sum(s["gpu_hours"] for s in stages),
        "measured": measured,
    }
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        from .report import print_plan

        print_plan(result)
    return 0 if result["fits"] else 1


def plan_stage(name: str, run: RunConfig, args: argparse.Namespace, measured: dict[str, Any] | None) -> dict[str, Any]:
    """Everything about one stage, in plain values; bytes, tokens, hours."""
    m, t = run.model, run.trainer
    vocab_size = vocabulary_size(run)
    gpu = args.gpu_memory if args.gpu_memory or t.accelerator == "cpu" else GPU_MEMORY
    parts = memory(run, vocab_size)
    largest = max(parts, key=lambda part: part.total)
    data, missing = read_data(run)
    flops = flops_per_token(run, vocab_size, data)
    world, v = run.world_size, m.virtual_pipeline_model_parallel_size or 1
    p, micro = m.pipeline_model_parallel_size, run.num_microbatches
    tokens = t.max_steps * run.tokens_per_step
    speed = expected_speed(run, flops, args, measured)
    hours = None if speed is None else tokens / (speed["tokens_per_second_per_gpu"] * world * 3600)
    return {
        "name": name,
        "parameters": parameters(run, vocab_size),
        "precision": "fp8" if m.fp8 else {"32": "fp32"}.get(t.precision, t.precision),
        "accelerator": t.accelerator,
        "layout": {
            "nodes": t.num_nodes,
            "gpus_per_node": t.devices,
            "tensor": m.tensor_model_parallel_size,
            "sequence_parallel": m.sequence_parallel and m.tensor_model_parallel_size > 1,
            "pipeline": p,
            "virtual_pipeline": m.virtual_pipeline_model_parallel_size,
            "context": m.context_parallel_size,
            "data": run.data_parallel_size,
            "micro_batch_size": m.micro_batch_size,
            "micro_batches": micro,
            "recomputation": m.activations_checkpoint_granularity or "none",
            "bubble": (p - 1) / (micro * v + p - 1),
        },
        "notes": notes(run),
        "memory": {
            "gpu_gib": gpu,
            "fits": gpu is None or largest.total <= gpu * GIB,
            "largest_stage": largest.stage,
            "largest_gib": largest.total / GIB,
            "largest_part": max(PARTS, key=lambda part: getattr(largest, part)),
            "stages": [{**asdict(part), "total": part.total} for part in parts],
            "assumed": {"overhead_gib": OVERHEAD / GIB, "allocator": ALLOCATOR},
        },
        "seq_length": m.data.seq_length,
        "global_batch_size": m.global_batch_size,
        "steps": t.max_steps,
        "tokens_per_step": run.tokens_per_step,
        "samples": t.max_steps * m.global_batch_size,
        "tokens": tokens,
        "data": None if data is None else data.facts,
        "data_missing": missing,
        "exact": exposure(run, data),
        "flops_per_token": flops,
        "speed": speed,
        "hours": hours,
        "gpu_hours": None if hours is None else hours * world,
    }


def vocabulary_size(run: RunConfig) -> int:
    if run.model.override_vocab_size is not None:
        return run.model.override_vocab_size
    from .training.vocabulary import read_vocabulary

    return read_vocabulary(run, scan=False).vocab_size


def notes(run: RunConfig) -> list[str]:
    """What the checks allow and is slow, or takes memory beside the estimate, all the same."""
    from .training.fp8 import slow

    m, t, gpus = run.model, run.trainer, run.trainer.devices
    tp, cp, found = m.tensor_model_parallel_size, m.context_parallel_size, []
    if gpus % tp:
        found.append(
            f"tensor-parallel groups of {tp} cross nodes of {gpus} GPUs, whose links are slower: use a size that divides"
        )
    elif cp > 1 and gpus % (tp * cp):
        found.append(f"context-parallel groups ({tp} x {cp} GPUs) cross nodes of {gpus}")
    if tp > 1 and not m.sequence_parallel:
        found.append("model.sequence_parallel=false keeps norms' activations whole on every tensor-parallel rank")
    if m.fp8:
        found += slow(run)
    if m.deterministic_mode and t.precision == "bf16" and t.accelerator != "cpu":
        found.append(
            f"model.deterministic_mode=true: on Hopper cuDNN before {CUDNN // 10000}.{CUDNN // 100 % 100} takes another "
            f"{attention_workspace(run) / GIB:,.1f} GiB for the backward of attention"
        )
    if m.pipeline_model_parallel_size > run.num_microbatches:
        found.append(f"{run.num_microbatches} micro-batches leave some of the pipeline's stages idle all the time")
    return found


@dataclass(frozen=True)
class Data:
    """facts: a row a source; pairs: mean number of keys that a query sees; census: of the planned samples, by share."""

    facts: list[dict[str, Any]]
    pairs: float
    census: ExposureCensus


def read_data(run: RunConfig) -> tuple[Data | None, list[str]]:
    """Training data from their .idx files; (None, the prefixes without one) where some are not there yet.

    Documents are taken in stored order, all of them: the run itself shuffles, repeats and cuts off the validation split.
    """
    from .training.lengths import check_lengths
    from .training.vocabulary import data_prefixes

    data, blends = run.model.data, data_prefixes(run)
    blend = blends.get("all") or blends["train"]
    assert blend is not None
    prefixes, weights = blend
    missing = [prefix for prefix in prefixes if not os.path.isfile(prefix + ".idx")]
    if missing:
        return None, missing
    held_out = blends.get("validation")
    if held_out is None or all(os.path.isfile(prefix + ".idx") for prefix in held_out[0]):
        check_lengths(run)
    used = 1.0
    if "all" in blends:
        parts = [float(part) for part in data.splits_string.replace("/", ",").split(",")]
        used = parts[0] / sum(parts)
    lengths = [read_index(prefix, run.whole_documents).lengths for prefix in prefixes]
    tokens = np.array([int(part.sum(dtype=np.int64)) for part in lengths])
    share = tokens / tokens.sum() if weights is None else np.array(weights) / sum(weights)
    samples, s = run.trainer.max_steps * run.model.global_batch_size, data.seq_length
    facts, pairs, counts = [], 0.0, np.zeros(s + 1)
    for prefix, part, total, weight in zip(prefixes, lengths, tokens, share):
        order = stored_order(part, s)
        census = ExposureCensus.from_document_lengths(part, s, document_index=order, eod_mask_loss=data.eod_mask_loss)
        counts += census.counts * (weight * samples / census.samples)
        pieces = piece_histogram(part, s, document_index=order, samples=census.samples)
        size = np.arange(s + 1, dtype=np.float64)
        pairs += weight * float((pieces.ended + pieces.continued) @ (size * (size + 1) / 2)) / census.tokens
        facts.append(
            {
                "prefix": prefix,
                "share": float(weight),
                "documents": len(part),
                "tokens": int(total * used),
                "epochs": float(weight * samples * s / (total * used)),
            }
        )
    if not data.document_masking:
        pairs = (s + 1) / 2
    return Data(facts, pairs, ExposureCensus(np.rint(counts), s, samples)), []


def exposure(run: RunConfig, data: Data | None) -> dict[str, Any] | None:
    """Tail and weights that the census gives, whether or not this arm uses them; None without data.

    Raises:
        ValueError: no target in the tail, which a baseline is told too: its other arm could not run.
    """
    if data is None:
        return None
    table = WeightTable.from_census(data.census, run.model.exact)
    return {
        "enabled": run.model.exact.enabled,
        "tau": table.config.tau,
        "alpha": table.config.alpha,
        "gamma": table.config.gamma,
        "tail_share": table.tail_share,
        "weighted_tail_share": table.weighted_tail_share,
        "buckets": table.rows(),
    }


def flops_per_token(run: RunConfig, vocab_size: int, data: Data | None) -> dict[str, Any]:
    """Floating-point operations of the model, forward and backward, a token; nothing for recomputation.

    6 a weight of every matrix that is multiplied (the output layer, not the input embedding), and 12 a query channel for each
    key that a query sees: half of the window, or what the documents leave (sum of L (L + 1) / 2 over the pieces).
    """
    m = run.model
    _, q, _ = attention_widths(m)
    window = (m.data.seq_length + 1) / 2
    pairs = window if data is None else data.pairs
    matrices = m.num_layers * sum(linear_parameters(m)) + m.hidden_size * run.padded_vocab_size(vocab_size)
    return {
        "total": 6 * matrices + 12 * m.num_layers * q * pairs,
        "attention": 12 * m.num_layers * q * pairs,
        "keys_seen": pairs,
        "counted": "full causal window" if pairs == window else "document by document",
    }


def expected_speed(
    run: RunConfig, flops: dict[str, Any], args: argparse.Namespace, measured: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Tokens/s a GPU and the utilisation that goes with it; None where neither is given or measured.

    Raises:
        ValueError: a utilisation without a peak (a precision other than bf16 and FP8).
    """
    peak = args.peak_tflops or PEAK_TFLOPS.get("fp8" if run.model.fp8 else run.trainer.precision)
    if run.trainer.accelerator == "cpu" and not args.peak_tflops:
        peak = None
    speed, source = args.tokens_per_second_per_gpu, "--tokens-per-second-per-gpu"
    mfu, mfu_source = args.mfu, "--mfu"
    if measured is not None:
        source = mfu_source = measured["source"]
        speed = measured["tokens_per_second_per_gpu"]
        # Another window or layout: the same operations a second, not the same tokens.
        speed *= measured["flops_per_token"] / flops["total"]
    if speed is None and mfu is None:
        return None
    if speed is None:
        if peak is None:
            raise ValueError(
                f"--mfu with trainer.precision={run.trainer.precision} on trainer.accelerator={run.trainer.accelerator}: of what? "
                "Give --peak-tflops, or --tokens-per-second-per-gpu"
            )
        speed, source = mfu * peak * 1e12 / flops["total"], mfu_source
    return {
        "tokens_per_second_per_gpu": speed,
        "tokens_per_second": speed * run.world_size,
        "tflops_per_gpu": speed * flops["total"] / 1e12,
        "peak_tflops": peak,
        "mfu": speed * flops["total"] / 1e12 / peak if peak else None,
        "source": source,
    }


def read_measured(path: str) -> dict[str, Any]:
    """Speed, and the memory beside its estimate, from a run's folder.

    Raises:
        FileNotFoundError, ValueError: there is nothing measured at `path`.
    """
    from .training.config import load_config

    if not os.path.isdir(path):
        raise ValueError(
            f"--measured {path}: give the folder of a run (exp_manager.exp_dir), which says what was trained"
        )
    folder = Path(path)
    run = load_config(folder / "config.yaml")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if len(lines) <= UNCOUNTED_STEPS:
        raise ValueError(f"{path} has {len(lines)} steps; {UNCOUNTED_STEPS} are not counted: measure a longer run")
    record = folder / "memory.json"
    facts = json.loads(record.read_text()) if record.is_file() else None
    vocab_size = facts["vocab_size"] if facts else vocabulary_size(run)
    m = run.model
    layout = f"TP {m.tensor_model_parallel_size}, PP {m.pipeline_model_parallel_size}, CP {m.context_parallel_size}"
    return {
        "source": f"{path}: median of {len(lines) - UNCOUNTED_STEPS} steps, {run.world_size} ranks ({layout}), window "
        f"{m.data.seq_length:,}",
        "tokens_per_second_per_gpu": median(line["tokens_per_s"] for line in lines[UNCOUNTED_STEPS:]) / run.world_size,
        "flops_per_token": flops_per_token(run, vocab_size, read_data(run)[0])["total"],
        "memory": compare_memory(run, facts) if facts else None,
    }


def compare_memory(run: RunConfig, record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a pipeline stage: estimated and measured bytes, the largest of the stage's ranks."""
    rows = []
    for part in memory(run, record["vocab_size"]):
        ranks = [rank for rank in record["ranks"] if rank["stage"] == part.stage]
        row: dict[str, Any] = {"stage": part.stage}
        for name in ("weights", "gradients", "optimizer"):
            row[name] = (getattr(part, name), max(rank[name] for rank in ranks))
        if ranks[0]["peak_allocated"] is not None:
            row["allocated"] = (part.total - part.overhead, max(rank["peak_allocated"] for rank in ranks))
            row["device"] = (part.total, max(rank["device_used"] for rank in ranks))
        rows.append(row)
    return rows
