"""`exact-megatron plan`: layout, memory, tokens and hours of a run before it is started.

Runs on a login node: no torch, no GPU. Memory is an estimate (see memory.py); speed is the user's figure or a measured one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..allocation import WeightTable
from ..attention.supported import DETERMINISTIC_LIMIT
from ..training.determinism import CUDNN, FLASH_ATTN, attention_size, attention_workspace
from ..utils.environment import GIB
from .data import Data, read_data
from .flops import flops_per_token
from .measured import read_measured, vocabulary_size
from .memory import ALLOCATOR, OVERHEAD, PARTS, memory, parameters

if TYPE_CHECKING:
    from ..training.schema import RunConfig

GPU_MEMORY = 79.0  # GiB of an H100 80 GB that torch can use: it reports about 79.1 for an 80 GB part
# Dense TFLOP/s of an H100 SXM: half of the 1,979 and 3,958 with sparsity that NVIDIA's data sheet prints.
PEAK_TFLOPS = {"bf16": 989.5, "fp8": 1979.0}


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
    from ..training.config import load_config

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
    world = run.world_size
    v = m.virtual_pipeline_model_parallel_size or 1
    p = m.pipeline_model_parallel_size
    micro = run.num_microbatches
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


def notes(run: RunConfig) -> list[str]:
    """What the checks allow and is slow, or takes memory beside the estimate, all the same."""
    from ..training.fp8 import slow

    m = run.model
    t = run.trainer
    gpus = run.trainer.devices
    tp = m.tensor_model_parallel_size
    cp = m.context_parallel_size
    found = []
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
        if attention_size(run) >= DETERMINISTIC_LIMIT:
            found.append(
                f"model.deterministic_mode=true: on Hopper with Transformer Engine this needs flash-attn >= {FLASH_ATTN}, which attends "
                f"documents whose heads x queries x keys reach {DETERMINISTIC_LIMIT:,}"
            )
    if m.pipeline_model_parallel_size > run.num_microbatches:
        found.append(f"{run.num_microbatches} micro-batches leave some of the pipeline's stages idle all the time")
    return found


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
    speed = args.tokens_per_second_per_gpu
    source = "--tokens-per-second-per-gpu"
    mfu = args.mfu
    mfu_source = "--mfu"
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
        speed = mfu * peak * 1e12 / flops["total"]
        source = mfu_source
    return {
        "tokens_per_second_per_gpu": speed,
        "tokens_per_second": speed * run.world_size,
        "tflops_per_gpu": speed * flops["total"] / 1e12,
        "peak_tflops": peak,
        "mfu": speed * flops["total"] / 1e12 / peak if peak else None,
        "source": source,
    }
