"""Launch ranks for a test: one torchrun-like launch of a script, with a time limit, and nothing left running."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .forked import Forked

HERE = Path(__file__).parents[1]


def free_port() -> int:
    """A port below those that the system gives to outgoing connections, since it may be used minutes later."""
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """This process's environment with torchrun's variables for a rank."""
    return {
        **os.environ,
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    }


def end(processes: list[subprocess.Popen]) -> None:
    """Kill what is left of processes that were started in sessions of their own."""
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def launch(script: str, arguments: list[str], world: int, timeout: float = 480) -> None:
    """Run tests/SCRIPT ARGUMENTS (or -m ARGUMENTS) as `world` ranks; AssertionError with the output of the rank that failed."""
    command = ["-m" if script == "-m" else str(HERE / script), *arguments]
    port = free_port()
    ranks: list[Forked] = []
    try:
        for rank in range(world):
            ranks.append(Forked(command, env=environment(rank, world, port)))
        outputs = ["".join(rank.communicate(timeout)) for rank in ranks]
        codes = [rank.returncode for rank in ranks]
    finally:
        for rank in ranks:
            rank.end()
    for number, (code, output) in enumerate(zip(codes, outputs)):
        assert code == 0, f"rank {number} of {world} ended with {code}:\n{output[-6000:]}"


def launch_fresh(command: list[str], world: int, log: Path, path: Sequence[Path], timeout: float) -> list[int]:
    """Run `python COMMAND` as `world` ranks, each an interpreter of its own: for hosts, whose megatron.core is not the tests'.

    Args:
        log: a rank's output goes to LOG.RANK; the ranks run in the folder of that.
        path: PYTHONPATH.

    Returns:
        The exit codes.
    """
    port = free_port()
    more = {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "TORCH_COMPILE_DISABLE": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    ranks: list[subprocess.Popen] = []
    deadline = time.monotonic() + timeout
    try:
        for rank in range(world):
            env = {k: v for k, v in environment(rank, world, port).items() if not k.startswith("EXACT_")} | more
            with open(f"{log}.{rank}", "w") as out:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        env=env,
                        stdout=out,
                        stderr=out,
                        cwd=log.parent,
                        start_new_session=True,
                    )
                )
        return [rank.wait(timeout=max(1, deadline - time.monotonic())) for rank in ranks]
    finally:
        end(ranks)


def run_jobs(command: list[str], folder: Path, world: int, jobs: list[dict], path: Sequence[Path]) -> None:
    """Run jobs {"name", ...} of a host one after another as `world` ranks of `python COMMAND JOBS.json FOLDER`, a script that hands
    them to jobs.run_each; afterwards nothing of them is left."""
    for job in jobs:
        job.update(port=free_port(), seconds=120)
    table = folder / f"jobs{world}.json"
    table.write_text(json.dumps(jobs))
    log = folder / f"ranks{world}"
    codes = launch_fresh([*command, str(table), str(folder)], world, log, path, timeout=120 * (1 + len(jobs)))
    for rank, code in enumerate(codes):
        assert code == 0, Path(f"{log}.{rank}").read_text()[-4000:]
