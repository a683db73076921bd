"""`exact-megatron benchmark`: what the plugin costs beside Megatron's own code, both timed in one process.

The arms of a benchmark take turns and medians are compared, so that other work on the machine slows both.
Documents are synthetic, with log-normal lengths: exp(N(MU, SIGMA)) tokens, clipped to CLIP.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .arms import Arm, prove_arms
from .machine import machine

MU, SIGMA, CLIP = 6.0, 1.2, (8, 131072)  # median 403 and mean about 830 tokens
VOCABULARY = 4096
SEED = 1234
WARMUP = 5  # uncounted training steps of each arm

# Like configs/demo.yaml, on one rank.
STEP_DEFAULTS = """
    model.micro_batch_size=2 model.global_batch_size=4 model.num_layers=4 model.hidden_size=128
    model.ffn_hidden_size=352 model.num_attention_heads=8 model.num_query_groups=4
    model.data.seq_length=1024 model.data.num_workers=0 model.data.splits_string=1 model.optim.lr=2e-3
""".split()
STEP_FORCED = """
    trainer.devices=1 trainer.num_nodes=1 model.tensor_model_parallel_size=1 model.context_parallel_size=1
    model.pipeline_model_parallel_size=1 model.virtual_pipeline_model_parallel_size=null
    model.optim.sched.name=constant model.optim.sched.warmup_steps=0
    trainer.limit_val_batches=0 restore_from_path=null
""".split()


@dataclass(frozen=True)
class Row:
    """A median and its reference in `unit`, their ratio (and its 95 % interval), whether it keeps the bar ("": none)."""

    name: str
    own: float
    reference: float
    unit: str
    ratio: float
    bar: str
    passed: bool
    interval: tuple[float, ...] | None = None


Measured = tuple[dict[str, Any], list[Row]]  # facts, with "setup" among them, and the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    add = commands.add_parser("census", help="the census against Megatron's own index build")
    add.add_argument("--documents", type=int, default=50_000_000)
    add.add_argument("--seq-length", type=int, default=16384)
    add.add_argument("--repeats", type=int, default=3, help="runs of each arm")
    add.set_defaults(measure=measure_census)

    add = commands.add_parser("getitem", help="a sample against stock, without and with reset flags")
    add.add_argument("--seq-length", type=int, default=16384)
    add.add_argument("--samples", type=int, default=1000, help="of each arm; with reset flags 3 at most")
    add.set_defaults(measure=measure_getitem)

    add = commands.add_parser("step", help="a training step against the unweighted one with the same masks")
    add.add_argument("--config", metavar="FILE", help="YAML; default: a small model on synthetic documents")
    add.add_argument("--steps", type=int, default=200, help="of each arm")
    add.add_argument("overrides", nargs="*", metavar="key=value", help="for example model.hidden_size=256")
    add.set_defaults(measure=measure_step)

    from . import attention_benchmark, device_profile, qk_timing_benchmark, throughput_benchmark

    add = commands.add_parser("attention", help="the ways through context parallelism: cost model, emulated ranks")
    attention_benchmark.add_arguments(add)
    add.set_defaults(measure=attention_benchmark.measure)
    add = commands.add_parser("qk-timing", help="a training step during and after model.qk_timing against one without")
    qk_timing_benchmark.add_arguments(add)
    add.set_defaults(measure=qk_timing_benchmark.measure)

    add = commands.add_parser("throughput", help="LLaMA geometries with and without EXACT: speed, MFU, peak memory")
    throughput_benchmark.add_arguments(add)
    add.set_defaults(measure=throughput_benchmark.measure)

    add = commands.add_parser("ceiling", help="the matrix products and the copy that this device manages at best")
    device_profile.add_arguments(add)
    add.set_defaults(measure=device_profile.measure)
    for add in commands.choices.values():
        add.add_argument("--json", metavar="FILE", help="write the results as JSON too")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; 1 when a bar is missed.

    `args.measure(args)` returns ({"setup": what was measured and how, in words, and more facts}, rows).
    """
    command = ["exact-megatron", "benchmark", args.benchmark]
    names = (
        "documents seq_length batch heads kv_heads head_dim tp cp repeats samples dtype prefix kernel only config steps "
        "geometry windows precisions layers step_tokens micro_tokens blocks block_steps cell_seconds peak gpu_memory "
        "trial_layers cells until profile"
    )
    for name in names.split():
        value = getattr(args, name, None)
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            command += [option] * value
            continue
        if isinstance(value, (int, float)) and value < 1:
            raise ValueError(f"{option} {value} must be at least 1")
        command += [option, str(value)] if value is not None else []
    if getattr(args, "plan", False):
        from .throughput_benchmark import print_plan

        return print_plan(args)
    load = os.getloadavg()[0]
    before = _cpu_seconds()
    facts, rows = args.measure(args)
    wall, busy, own = (now - then for now, then in zip(_cpu_seconds(), before))
    result = {
        "benchmark": args.benchmark,
        "command": shlex.join([*command, *getattr(args, "overrides", [])]),
        **facts,
        **machine(),
        "load average at the start": round(load, 2),
        "cores used by other processes": round(max(0.0, busy - own) / wall, 2),
        "rows": [asdict(row) for row in rows],
    }
    print_result(result, rows)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row.passed for row in rows) else 1


def _cpu_seconds() -> tuple[float, float, float]:
    """(wall clock, CPU time of all processes on the machine, CPU time of this one), in seconds."""
    ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]  # without idle and waiting for a disk
    return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def interleaved(arms: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds[rounds] of each arm, called with the round's number; the order is ABBA."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds):
        for name in list(arms)[:: 1 if i % 2 == 0 else -1]:
            started = time.perf_counter()
            arms[name](i)
            seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def document_lengths(documents: int) -> np.ndarray:
    """int32[documents], tokens per document, EOD included."""
    drawn = np.random.default_rng(SEED).lognormal(MU, SIGMA, documents)
    return np.clip(drawn, *CLIP, out=drawn).astype(np.int32)


def write_corpus(
    prefix: str, tokens: int, vocabulary: int = VOCABULARY, lengths: np.ndarray | None = None
) -> np.ndarray:
    """Write at least `tokens` random tokens as .bin, .idx and .json, EOD (0) last; returns the documents' lengths.

    Args:
        lengths: tokens per document to take from the start, again and again; None draws `document_lengths`.
    """
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    if lengths is None:
        lengths = document_lengths(tokens // CLIP[0] + 1)
    lengths = np.tile(lengths, -(-tokens // int(lengths.sum(dtype=np.int64))))
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(dtype=np.int64), tokens)) + 1]
    rng = np.random.default_rng(SEED)
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(vocabulary))
    for n in lengths.tolist():
        builder.add_document(torch.from_numpy(np.append(rng.integers(1, vocabulary, n - 1), 0)), [n])
    builder.finalize(prefix + ".idx")
    Path(prefix + ".json").write_text(json.dumps({"vocab_size": vocabulary, "eod_id": 0}))
    return lengths


def _corpus(documents: int, seq_length: int) -> str:
    law = f"log-normal, mu {MU:g}, sigma {SIGMA:g}, clipped to {CLIP[0]}..{CLIP[1]:,} tokens"
    return f"{documents:,} documents ({law}), window {seq_length:,}"


def _compare(name: str, own: np.ndarray, reference: np.ndarray, unit: str, limit: float) -> Row:
    medians = float(np.median(own)), float(np.median(reference))
    ratio = medians[0] / medians[1]
    return Row(name, *medians, unit, ratio, f"ratio <= {limit:g}", ratio <= limit)


def measure_census(args: argparse.Namespace) -> Measured:
    """ExposureCensus.from_document_lengths against Megatron's indices for the same documents."""
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import _build_document_index, _build_shuffle_index

    from .exposure import ExposureCensus

    lengths = document_lengths(args.documents)
    tokens = int(lengths.sum(dtype=np.int64))
    documents = np.arange(len(lengths), dtype=np.int32)

    def indices(_: int = 0) -> np.ndarray:
        state = np.random.RandomState(SEED)
        order = _build_document_index(documents, 1, state, False)
        samples = len(helpers.build_sample_idx(lengths, order, args.seq_length, 1, tokens, True, True)) - 1
        _build_shuffle_index(samples, samples, state)
        return order

    order = indices()

    def census(_: int = 0) -> ExposureCensus:
        return ExposureCensus.from_document_lengths(lengths, args.seq_length, document_index=order)

    samples = census().samples
    seconds = interleaved({"census": census, "indices": indices}, args.repeats)
    mib: list[float] = []
    for arm in (census, indices):
        tracemalloc.start()
        arm()
        mib.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    setup = (
        f"{_corpus(len(lengths), args.seq_length)}, {tokens:,} tokens in {samples:,} samples, {args.repeats} "
        "runs an arm; reference: Megatron's _build_document_index, build_sample_idx, _build_shuffle_index; "
        "extra memory: peak by tracemalloc, which does not see what Megatron's C++ takes"
    )
    memory = Row("extra memory", mib[0], mib[1], "MiB", mib[0] / mib[1], "own <= 256 MiB", mib[0] <= 256)
    return {"setup": setup}, [_compare("census", seconds["census"], seconds["indices"], "s", 0.5), memory]


def measure_getitem(args: argparse.Namespace) -> Measured:
    """A weighted sample with document boundaries against the stock dataset's."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset

    from .loss import ExactLoss, gpt_loss
    from .training.config import load_config
    from .training.data import Vocabulary, build_datasets

    few = min(3, args.samples)
    with tempfile.TemporaryDirectory() as folder:
        documents = len(write_corpus(f"{folder}/corpus", args.samples * args.seq_length + 1))
        settings = load_config(None, [
            f"model.data.data_prefix=[{folder}/corpus]", "model.data.splits_string=1",
            f"model.data.index_mapping_dir={folder}/cache", f"model.data.seq_length={args.seq_length}",
            f"trainer.max_steps={args.samples}", "model.global_batch_size=1", "model.exact.enabled=true",
        ])  # fmt: skip
        loss = ExactLoss(settings.model.exact)
        hooked = loss.wrap(gpt_loss)
        (exact, _, _), _ = build_datasets(settings, Vocabulary(VOCABULARY, eod=0), loss)
        flags = copy.copy(exact.config)
        flags.reset_position_ids = flags.reset_attention_mask = flags.create_attention_mask = True
        stock, reset = (
            BlendedMegatronDatasetBuilder(GPTDataset, [args.samples, 0, 0], lambda: True, config).build()[0]
            for config in (exact.config, flags)
        )
        proof = prove_arms(Arm(exact, hooked), Arm(stock, gpt_loss), 1)
        # Half the corpus apart, so that no arm finds its tokens in the processor's cache by the other's work.
        arms = {"exact": exact.__getitem__, "stock": lambda i: stock[(i + args.samples // 2) % args.samples]}
        interleaved(arms, args.samples)
        fast = interleaved(arms, args.samples)
        slow = interleaved({"exact": exact.__getitem__, "reset": reset.__getitem__}, few)
    setup = (
        f"{_corpus(documents, args.seq_length)}, in the page cache; EXACT gives weights and cu_seqlens; "
        f"{args.samples:,} samples an arm, {few} with reset_position_ids and reset_attention_mask"
    )
    return {"setup": setup, "arms": proof}, [
        _compare("against stock", fast["exact"] * 1e3, fast["stock"] * 1e3, "ms", 1.25),
        _compare("against reset flags", slow["exact"] * 1e3, slow["reset"] * 1e3, "ms", 0.05),
    ]


@contextmanager
def one_rank(args: argparse.Namespace, steps: int, forced: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """(settings, Trainer) of a benchmark that trains `steps` steps on synthetic documents, or on the data of --config."""
    from .training.config import load_config
    from .training.launch import be_single_rank, is_rank

    if is_rank():
        raise ValueError(f"`exact-megatron benchmark {args.benchmark}` is one rank: start it without torchrun or srun")
    with tempfile.TemporaryDirectory() as folder:
        defaults = [] if args.config else [*STEP_DEFAULTS, f"model.data.data_prefix=[{folder}/corpus]"]
        forced = [*STEP_FORCED, *forced, f"model.data.index_mapping_dir={folder}/cache"]
        forced += [f"exp_manager.exp_dir={folder}/run", f"trainer.max_steps={steps}"]
        settings = load_config(args.config, [*defaults, *args.overrides, *forced])
        if settings.model.data.data_prefix == [f"{folder}/corpus"]:
            write_corpus(f"{folder}/corpus", steps * settings.tokens_per_step + 1)
        be_single_rank()
        import torch

        from .training.trainer import Trainer, shutdown

        try:
            yield settings, Trainer(settings, progress=False)
        finally:
            shutdown()
            torch.distributed.destroy_process_group()


def describe_steps(settings: Any, trainer: Any, steps: int) -> str:
    """What was trained and how it was timed, in words."""
    import torch

    m = settings.model
    parameters = sum(p.numel() for chunk in trainer.model for p in chunk.parameters())
    return (
        f"{parameters:,} parameters ({m.num_layers} layers of {m.hidden_size}), {settings.tokens_per_step:,} tokens "
        f"a step in windows of {m.data.seq_length:,}, one rank on {trainer.device.type}, "
        f"{torch.get_num_threads()} threads; {steps} steps an arm, in pairs on the same batch; ratio: "
        "median over the pairs, 95 % interval by bootstrap"
    )


def median_of_pairs(pairs: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Median and its 95 % interval."""
    return float(np.median(pairs)), interval(pairs)


def measure_step(args: argparse.Namespace) -> Measured:
    """Steps with and without EXACT, of one model on the same batches with the same document masks."""
    from .loss import gpt_loss
    from .training.data import build_loader

    with one_rank(args, args.steps + WARMUP, ["model.exact.enabled=true"]) as (settings, trainer):

        def arm(own: Arm) -> Callable[[int], Any]:
            loader = iter(build_loader(settings, own.dataset, trainer.vocabulary, consumed=0))

            def step(_: int) -> None:
                trainer.loss_func = own.loss_func
                trainer.train_step(loader)

            return step

        exact = Arm(trainer.train_data, trainer.loss_func)
        baseline = Arm(twin(trainer.train_data, weight_table=None), gpt_loss)
        proof = prove_arms(exact, baseline, settings.model.global_batch_size)
        arms = {"exact": arm(exact), "baseline": arm(baseline)}
        interleaved(arms, WARMUP)
        seconds = interleaved(arms, args.steps)
        setup = describe_steps(settings, trainer, args.steps)
    ratio, interval = median_of_pairs(seconds["baseline"] / seconds["exact"])
    own, reference = (settings.tokens_per_step / float(np.median(seconds[name])) for name in ("exact", "baseline"))
    row = Row("training step", own, reference, "tokens/s", ratio, "ratio >= 0.99", ratio >= 0.99, interval)
    return {"setup": setup, "arms": proof}, [row]


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the median, by bootstrap."""
    drawn = np.random.default_rng(SEED).integers(0, len(values), (4000, len(values)))
    low, high = np.quantile(np.median(values[drawn], axis=1), [0.025, 0.975])
    return float(low), float(high)


def twin(dataset: Any, **changes: Any) -> Any:
    """The same samples from a copy with other attributes: weight_table=None as with model.exact.enabled=false."""
    copied = copy.copy(dataset)
    if hasattr(dataset, "datasets"):  # a blend
        copied.datasets = [twin(member, **changes) for member in dataset.datasets]
    vars(copied).update(changes)
    return copied


def print_result(result: dict[str, Any], rows: Sequence[Row]) -> None:
    """The table, and below it what was measured on what."""
    from rich.console import Console
    from rich.table import Table

    def number(value: float) -> str:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    table = Table(title=f"benchmark {result['benchmark']}")
    for heading in ("", "own", "reference", "unit", "ratio", "bar", "result"):
        table.add_column(heading, justify="right" if heading in ("own", "reference", "ratio") else "left")
    for row in rows:
        interval = " ({} to {})".format(*map(number, row.interval)) if row.interval else ""
        cells = row.name, number(row.own), number(row.reference), row.unit, number(row.ratio) + interval
        table.add_row(*cells, row.bar, "" if not row.bar else "passed" if row.passed else "MISSED")
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(table)
    for key in [key for key in result if key not in ("benchmark", "rows")]:
        value = result[key]
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        console.print(f"{key}: {text}", soft_wrap=True)
