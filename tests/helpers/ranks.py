"""Launch ranks for a test: one torchrun-like launch of a script, with a time limit, and nothing left running."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

from .forked import Forked

HERE = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


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
    meeting = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    ranks: list[Forked] = []
    try:
        for rank in range(world):
            env = {**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(Forked(command, env=env))
        outputs = ["".join(rank.communicate(timeout)) for rank in ranks]
        codes = [rank.returncode for rank in ranks]
    finally:
        for rank in ranks:
            rank.end()
    for number, (code, output) in enumerate(zip(codes, outputs)):
        assert code == 0, f"rank {number} of {world} ended with {code}:\n{output[-6000:]}"
