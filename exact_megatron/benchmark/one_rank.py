"""A training run of the native runner as the only rank, for timing its steps."""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..utils.ranks import ONE_RANK, be_single_rank, is_rank
from .synthetic import write_corpus

WARMUP = 5  # uncounted training steps of each arm

# Like configs/demo.yaml, on one rank.
STEP_DEFAULTS = """
    model.micro_batch_size=2 model.global_batch_size=4 model.num_layers=4 model.hidden_size=128
    model.ffn_hidden_size=352 model.num_attention_heads=8 model.num_query_groups=4
    model.data.seq_length=1024 model.data.num_workers=0 model.data.splits_string=1 model.optim.lr=2e-3
""".split()
STEP_FORCED = [
    *ONE_RANK,
    "model.optim.sched.name=constant",
    "model.optim.sched.warmup_steps=0",
    "trainer.limit_val_batches=0",
    "restore_from_path=null",
]


@contextmanager
def one_rank(args: argparse.Namespace, steps: int, forced: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """(settings, Trainer) of a benchmark that trains `steps` steps on synthetic documents, or on the data of --config.

    Raises:
        ValueError: this process is a rank, or was one for another benchmark: megatron-core's DDP keeps a model in memory until its
            process ends, so that the peaks of the next would count it.
    """
    from ..training.config import load_config

    if is_rank():
        raise ValueError(
            f"`exact-megatron benchmark {args.benchmark}` is one rank, in a process of its own: start it without torchrun or srun, "
            "and each benchmark by a command of its own"
        )
    with tempfile.TemporaryDirectory() as folder:
        defaults = [] if args.config else [*STEP_DEFAULTS, f"model.data.data_prefix=[{folder}/corpus]"]
        forced = [*STEP_FORCED, *forced, f"model.data.index_mapping_dir={folder}/cache"]
        forced += [f"exp_manager.exp_dir={folder}/run", f"trainer.max_steps={steps}"]
        settings = load_config(args.config, [*defaults, *args.overrides, *forced])
        if settings.model.data.data_prefix == [f"{folder}/corpus"]:
            write_corpus(f"{folder}/corpus", steps * settings.tokens_per_step + 1)
        be_single_rank()
        import torch

        from ..training.trainer import Trainer, shutdown

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


def copy_dataset(dataset: Any, **changes: Any) -> Any:
    """The same samples from a copy with other attributes: weight_table=None as with model.exact.enabled=false."""
    copied = copy.copy(dataset)
    if hasattr(dataset, "datasets"):  # a blend
        copied.datasets = [copy_dataset(member, **changes) for member in dataset.datasets]
    vars(copied).update(changes)
    return copied
