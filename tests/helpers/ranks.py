"""Launch ranks for a test: one torchrun-like launch of a script, with a time limit, and nothing left running."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

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


def launch(script: str, arguments: list[str], world: int, timeout: float = 240) -> None:
    """Run tests/SCRIPT ARGUMENTS as `world` ranks; AssertionError with the output of the rank that failed."""
    port = str(free_port())
    ranks = []
    for rank in range(world):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "TORCH_COMPILE_DISABLE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(HERE / script), *arguments],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    try:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        end(ranks)
    for number, (rank, output) in enumerate(zip(ranks, outputs)):
        assert rank.returncode == 0, f"rank {number} of {world} ended with {rank.returncode}:\n{output[-6000:]}"
