"""Starting the ranks of a run on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

from ..config import ExactError

ONE_SIGNAL = 0.2  # seconds: `timeout` sends its signal to the process and to its group, which is one request
SHUTDOWN_SECONDS = 600  # for a checkpoint after a stop signal; torchrun's own default of 30 s would kill it half-way

ONE_RANK = """
    trainer.devices=1 trainer.num_nodes=1 model.tensor_model_parallel_size=1 model.context_parallel_size=1
    model.pipeline_model_parallel_size=1 model.virtual_pipeline_model_parallel_size=null model.sequence_parallel=false
    model.expert_model_parallel_size=1
""".split()  # overrides for the settings of a run, whatever its own layout


def is_rank() -> bool:
    """Whether torchrun or srun started this process as one rank of several; srun's variables are then given torch's names.

    Raises:
        ExactError: srun started several tasks, but MASTER_ADDR does not say where they meet.
    """
    if "RANK" in os.environ:
        return True
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        if "MASTER_ADDR" not in os.environ:
            raise ExactError(
                "srun started several tasks: set MASTER_ADDR (and MASTER_PORT) to the first node's address"
            )
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ.setdefault("MASTER_PORT", "29500")
        return True
    return False


def be_single_rank() -> None:
    """Make this process the only rank."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = "0"  # any free port


def torchrun(devices: int, arguments: list[str]) -> list[str]:
    """Command that runs `python -m exact_megatron ARGUMENTS` as `devices` ranks on this machine, passing stop signals on."""
    from torch.distributed.run import get_args_parser

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]
    known = get_args_parser()._option_string_actions
    for option, value in (
        ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"),
        ("--shutdown_timeout", str(SHUTDOWN_SECONDS)),
    ):
        if option in known:  # torch >= 2.9
            command += [option, value]
    return [*command, "-m", "exact_megatron", *arguments]


def launch(command: list[str]) -> int:
    """Run a command with its output passed through, and return its exit code.

    It gets a session of its own, so that Ctrl-C in the terminal reaches it as one SIGTERM, at which it saves
    a checkpoint and stops. It ignores SIGUSR1, which Slurm may send to every process of a job step.

    Raises:
        KeyboardInterrupt: this process got SIGINT; the command has ended.
        SystemExit: it got SIGTERM, SIGHUP or SIGUSR1; the code is 128 + signal.
    """
    received: list[int] = []
    first = 0.0
    process: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: Any) -> None:
        nonlocal first
        if received and time.monotonic() - first < ONE_SIGNAL:
            return
        received.append(number)
        first = first or time.monotonic()
        if process is None:
            return
        if len(received) == 1:
            print("stopping after a checkpoint; a second signal kills", file=sys.stderr, flush=True)
            process.terminate()
        else:
            _kill(process.pid)

    def ignore() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    try:
        process = subprocess.Popen(command, start_new_session=True, preexec_fn=ignore)
        if received:
            process.terminate()
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        if received[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + received[0])
    return code


def _kill(pid: int) -> None:
    """Kill a process and all that it started; torchrun's ranks are in sessions of their own."""
    import psutil  # type: ignore[import-untyped]

    try:
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            process.kill()
    except psutil.NoSuchProcess:
        return
