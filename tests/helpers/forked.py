"""Processes forked from one that has imported torch and megatron.core already: a start costs milliseconds, not seconds.

The fork server is Python's own (multiprocessing's "forkserver"); it starts at the first use and ends with the tests. Each process leads a
session of its own, so that a test can kill it together with all that it has started.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

# What the tests' processes import anyway. None of it starts threads, so that forking after it is safe.
PRELOADED = [
    "torch.distributed.checkpoint",
    "torch.utils.tensorboard",
    "megatron.core.models.gpt",
    "megatron.core.dist_checkpointing",
    "megatron.core.datasets.gpt_dataset",
    "exact_megatron.training.trainer",
    "exact_megatron.cli",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


class Forked:
    """`python COMMAND`, where COMMAND is a script, -m MODULE or -c CODE, and its arguments; a context manager that leaves nothing running.

    Args:
        command: the words after `python`.
        env: the whole environment; None is this process's. What torch reads when it is imported is the fork server's.
    """

    def __init__(self, command: list[str], env: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        files = [str(file) for file in self._files]
        environment = dict(os.environ if env is None else env)
        self._process = _context.Process(target=_run, args=(command, files, environment, os.getcwd()))
        self._process.start()
        self.pid = self._process.pid

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def poll(self) -> int | None:
        """Its exit code, below 0 the signal that ended it; None while it runs."""
        return self._process.exitcode

    returncode = property(poll)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote to standard output and standard error."""
        self._process.join(timeout)
        out, err = (file.read_text(errors="replace") for file in self._files)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0, out, err)
        return out, err

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        """Kill what is left of it and of its session."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.join()
        self._folder.cleanup()


def run(command: list[str], timeout: float = 120) -> subprocess.CompletedProcess:
    """Like subprocess.run([python, *command], capture_output=True, text=True)."""
    with Forked(command) as process:
        out, err = process.communicate(timeout)
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def _run(command: list[str], files: list[str], env: dict[str, str], cwd: str) -> None:
    multiprocessing.set_start_method(None, force=True)  # Python's default again, not the fork server's
    os.setsid()
    for number, file in zip((1, 2), files):
        target = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(target, number)
        os.close(target)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(command[1], {"__name__": "__main__"})
    else:
        sys.argv = list(command)
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
