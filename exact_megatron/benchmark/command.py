"""`exact-megatron benchmark`: what the plugin costs beside Megatron's own code, both timed in one process.

The arms of a benchmark take turns and medians are compared, so that other work on the machine slows both.
Documents are synthetic, with log-normal lengths: exp(N(MU, SIGMA)) tokens, clipped to CLIP.
"""

from __future__ import annotations

import argparse

from .dataset import measure_census, measure_getitem
from .harness import run
from .step import measure_step

__all__ = ["add_arguments", "run"]


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

    from . import attention, ceiling, qk_timing
    from .throughput import command as throughput

    add = commands.add_parser("attention", help="the ways through context parallelism: cost model, emulated ranks")
    attention.add_arguments(add)
    add.set_defaults(measure=attention.measure)
    add = commands.add_parser("qk-timing", help="a training step during and after model.qk_timing against one without")
    qk_timing.add_arguments(add)
    add.set_defaults(measure=qk_timing.measure)

    add = commands.add_parser("throughput", help="LLaMA geometries with and without EXACT: speed, MFU, peak memory")
    throughput.add_arguments(add)
    add.set_defaults(measure=throughput.measure, run=throughput.run)

    add = commands.add_parser("ceiling", help="the matrix products and the copy that this device manages at best")
    ceiling.add_arguments(add)
    add.set_defaults(measure=ceiling.measure)
    for add in commands.choices.values():
        add.add_argument("--json", metavar="FILE", help="write the results as JSON too")
