"""Each model in a process of its own: `python -m exact_megatron.benchmark.throughput.jobs SPEC.json RESULT.json`.

A process gives all of its memory back: megatron.core's DDP hooks, schedule functions and FP8 state hold a model in cycles
that no `del` opens.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...config import ExactError
from ...utils.environment import GIB
from ...utils.files import write_text
from ..ceiling import product
from ..geometry import GEOMETRIES
from .bench import measure_cell, measure_trial
from .cells import SPARE, Cell, Result

INTERRUPTED = 130  # exit code after SIGINT
TRIALS = (1, 2)  # layers, with --trial-layers


class OutOfMemory(Exception):
    """A job's model did not fit into the device's memory."""


def run_job(spec: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
    """In the job's own process: write {"result": ...} or {"out of memory": the message}.

    What was written before an error counts: a cell's blocks that are timed need no other layers when its profile runs out of memory.
    """
    import torch

    args = argparse.Namespace(**spec["options"])
    written = False

    def save(result: dict[str, Any]) -> None:
        nonlocal written
        write({"result": result})
        written = True

    try:
        if spec["job"] == "device":
            peak = args.peak or product("bf16", 8192, 8192, 8192)["TFLOP/s"]
            total = torch.cuda.get_device_properties(0).total_memory
            save({"GPU": torch.cuda.get_device_name(0), "peak": peak, "memory": total / GIB})
            return
        cell = Cell(**spec["cell"])
        with tempfile.TemporaryDirectory() as folder:
            if spec["job"] == "trial":
                save(measure_trial(cell, args, spec["layers"], folder))
            else:
                save(measure_cell(cell, args, spec["layers"], spec["peak"], folder, save))
    except RuntimeError as error:
        # torch.OutOfMemoryError is one; cuBLAS, cuDNN and Transformer Engine say it in words of their own.
        if (
            written
            or not isinstance(error, torch.cuda.OutOfMemoryError)
            and not re.search(r"out of memory|ALLOC_FAILED", str(error), re.IGNORECASE)
        ):
            raise
        write({"out of memory": str(error).splitlines()[0]})


def start_job(spec: dict[str, Any]) -> Any:
    """Run a job in a process of its own, and return its result; "exit code" is in a cell's whose profile failed.

    Raises:
        OutOfMemory: with the device's message.
        ExactError: the process failed otherwise; its own messages are on standard error.
        KeyboardInterrupt: SIGINT came before there was a result.
    """
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder, "spec.json"), Path(folder, "result.json")
        write_text(where[0], json.dumps(spec))
        command = [sys.executable, "-W", "ignore", "-m", "exact_megatron.benchmark.throughput.jobs", *map(str, where)]
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which kills the job
        try:
            code = subprocess.run(command, stdout=sys.stderr).returncode
        except KeyboardInterrupt:
            code = INTERRUPTED
        finally:
            signal.signal(signal.SIGTERM, previous)
        if code == INTERRUPTED and not where[1].exists():
            raise KeyboardInterrupt
        if code and not where[1].exists():
            raise ExactError(
                f"the process that measures {spec.get('cell') or spec['job']} ended with exit code {code}; its messages are above"
            )
        found = json.loads(where[1].read_text())
    if "out of memory" in found:
        raise OutOfMemory(found["out of memory"])
    return found["result"] | ({"exit code": code} if code else {})


def trial_layers(cell: Cell, options: dict[str, Any], gpu_memory: float) -> int:
    """Layers that fit by the measured peaks of one and of two layers; the geometry's at most.

    Raises:
        OutOfMemory: not even one layer fits.
    """

    def peak(layers: int) -> int:
        return int(start_job({"job": "trial", "options": options, "cell": vars(cell), "layers": layers})["peak"])

    one = peak(TRIALS[0])
    try:
        two = peak(TRIALS[1])
    except OutOfMemory:
        return TRIALS[0]
    room = SPARE * gpu_memory * GIB - one
    return max(1, min(GEOMETRIES[cell.geometry].layers, 1 + int(room / max(1, two - one))))


def cell_that_fits(cell: Cell, options: dict[str, Any], layers: int, peak: float | None) -> Result:
    """A cell's result with `layers`, or with as many fewer as have to go; "repeated" says why.

    Raises:
        OutOfMemory: not even one layer fits.
    """
    repeated: list[str] = []
    while True:
        try:
            spec = {"job": "cell", "options": options, "cell": vars(cell), "layers": layers, "peak": peak}
            result: Result = start_job(spec)
            return result | {"repeated": repeated}
        except OutOfMemory as error:
            if layers == 1:
                raise
            repeated.append(f"{cell} with {layers} layers: {error}")
            layers -= 1
            print(f"throughput: {repeated[-1]}; again with {layers}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    spec, result = map(Path, argv)

    def write(found: dict[str, Any]) -> None:
        """Whole, whenever this process may end."""
        part = result.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(result)

    try:
        run_job(json.loads(spec.read_text()), write)
    except (ValueError, OSError, ExactError) as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    code = 1
    try:
        code = main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
    finally:
        # Without the interpreter's own end: multiprocessing would wait for loader processes, which ignore its SIGTERM. They end by
        # themselves when this process is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
