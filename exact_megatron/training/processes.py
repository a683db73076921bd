"""A rank's helper processes end with it, also after kill -9: loader workers, and what writes a checkpoint."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_forking: int | None = None  # pid of the parent of the fork in progress
_registered = False


def end_with(parent: int) -> None:
    """Have the kernel kill this process when the thread of process `parent` that started it ends (Linux; elsewhere nothing)."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel was asked
            os._exit(1)


def end_forks_with_this_process() -> None:
    """Apply `end_with` to what this process forks from now on."""
    global _registered
    if not _registered:
        os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
        _registered = True


def keep_checkpoint_results_in_this_process() -> None:
    """Give megatron.core's checkpoint writer a queue of this process for its results.

    Left alone, the writer spawns a process on every rank that serves this queue, and that imports torch anew for it (megatron.core
    0.16 to 0.19). Only an asynchronous save needs that: ours are written and read by one process.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def _before_fork() -> None:
    global _forking
    # The signal follows the thread: a child of a short-lived one would be killed early.
    _forking = os.getpid() if threading.get_native_id() == os.getpid() else None


def _after_fork() -> None:
    if _forking is not None:
        end_with(_forking)
