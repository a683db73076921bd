"""Every benchmark with an EXACT arm, made vacuous: prints the message with which each one ends, as a JSON list.

In a process of its own: the CPU runtime changes torch.cuda for good.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from unittest import mock

SIZES = "num_layers=1 hidden_size=32 ffn_hidden_size=32 micro_batch_size=1 global_batch_size=2 data.seq_length=64"
OVERRIDES = ["trainer.accelerator=cpu", *(f"model.{setting}" for setting in SIZES.split())]
UNSCALED = "model.exact.normalization=none"  # the table has the weight 1, so that the hook takes unweighted data


def disabled(load):
    """load_config of a run in which model.exact.enabled=true is lost on the way."""
    return lambda path, overrides=None: load(path, [*(overrides or []), "model.exact.enabled=false"])


def with_loss(train_step, loss_of):
    """Trainer.train_step of a benchmark that gives every arm one loss function."""

    def step(trainer, loader):
        trainer.loss_func = loss_of(trainer)
        return train_step(trainer, loader)

    return step


def main() -> None:
    import torch

    from exact_megatron.benchmark import dataset as benchmark_dataset
    from exact_megatron.benchmark import one_rank, qk_timing
    from exact_megatron.benchmark import step as benchmark_step
    from exact_megatron.benchmark.throughput import command as throughput
    from exact_megatron.benchmark.throughput import jobs
    from exact_megatron.config import ExactError, QKTimingConfig
    from exact_megatron.loss import gpt_loss
    from exact_megatron.training import config
    from exact_megatron.training.trainer import Trainer, shutdown

    off = mock.patch.object(config, "load_config", disabled(config.load_config))
    same = mock.patch.object(one_rank, "copy_dataset", lambda dataset, **_: dataset)
    same = mock.patch.object(benchmark_step, "copy_dataset", lambda dataset, **_: dataset)
    never = mock.patch.object(QKTimingConfig, "factor", lambda *_: 1.0)
    hooked = mock.patch.object(
        Trainer, "train_step", with_loss(Trainer.train_step, lambda trainer: trainer.loss.wrap(gpt_loss))
    )
    plain = mock.patch.object(Trainer, "train_step", with_loss(Trainer.train_step, lambda _: gpt_loss))
    step = argparse.Namespace(benchmark="step", config=None, steps=1, overrides=OVERRIDES)
    timing = argparse.Namespace(benchmark="qk-timing", config=None, steps=1, overrides=OVERRIDES)
    timing.overrides = [*OVERRIDES, "model.num_layers=2"]
    getitem = argparse.Namespace(benchmark="getitem", seq_length=64, samples=4)
    parser = argparse.ArgumentParser()
    throughput.add_arguments(parser)
    options = vars(parser.parse_args(["--step-tokens=128", "--micro-tokens=64", "--blocks=1"]))
    options["overrides"] = [
        "model.data.num_workers=0"
    ]  # loader processes outlive their loader here, and are waited for
    cell = {"geometry": "tiny", "window": 64, "precision": "fp32"}
    job = {"job": "cell", "options": options, "cell": cell, "layers": 1, "peak": None}
    run_job = functools.partial(jobs.run_job, write=lambda _: None)
    said = []
    for patch, call, given in (
        (off, benchmark_dataset.measure_getitem, getitem),
        (off, benchmark_step.measure_step, step),
        (same, benchmark_step.measure_step, step),
        (never, qk_timing.measure, timing),
        (off, run_job, job),
        (hooked, benchmark_step.measure_step, argparse.Namespace(**vars(step) | {"overrides": [*OVERRIDES, UNSCALED]})),
        (hooked, run_job, job | {"options": options | {"overrides": [*options["overrides"], UNSCALED]}}),
        (plain, benchmark_step.measure_step, step),
        (plain, run_job, job),
    ):
        with patch, mock.patch.dict(os.environ):  # a rank's variables, which the next one must not find
            try:
                call(given)
                said.append("measured")
            except ExactError as error:
                said.append(str(error))
            if torch.distributed.is_initialized():  # a job's, which has a process of its own elsewhere
                shutdown()
                torch.distributed.destroy_process_group()
    json.dump(said, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # without waiting for the jobs' loader processes, which ignore multiprocessing's SIGTERM


if __name__ == "__main__":
    main()
