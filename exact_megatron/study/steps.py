"""Commands one after another, each until its result is there: what is done is kept, and the same call goes on after a stop."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import ExactError

SECONDS_TO_SAVE = 60  # a command has after the deadline to save and stop, before it is killed


class Unfinished(ExactError):
    """A step was stopped in order; the same call goes on from there."""


@dataclass(frozen=True)
class Step:
    """A command and its result.

    Attributes:
        name: in errors: "the run base".
        done: whether the result is there; asked before the command and after it.
        headline: printed on standard error before the command; "" prints nothing.
        check: raises ValueError where the result is not what it should be.
        progress: how far the command came, for the error where it was stopped: "after step 20 of 100".
        again: whether to run the command though its result is there.
        failed: the error where the command fails; "" names the exit code.
    """

    name: str
    command: list[str]
    done: Callable[[], bool]
    headline: str = ""
    check: Callable[[], None] | None = None
    progress: Callable[[], str] | None = None
    again: Callable[[], bool] | None = None
    failed: str = ""


def run_steps(steps: Sequence[Step], deadline: float | None = None) -> None:
    """Run the steps that are not done, in order.

    Args:
        deadline: value of time.monotonic() at which the command in progress is told to save and stop.

    Raises:
        Unfinished: the deadline came, or a command ended with code 0 and without its result.
        ExactError: a command failed.
        ValueError: see Step.check.
        KeyboardInterrupt, SystemExit: see launch.
    """
    for step in steps:
        if step.done() and not (step.again and step.again()):
            _say(step, ": done before")
            if step.check:
                step.check()
            continue
        if deadline is not None and time.monotonic() >= deadline:
            raise Unfinished(f"{step.name} is left for the next call, the time is over")
        _say(step)
        code = launch(step.command, deadline)
        if code:
            raise ExactError(step.failed or f"{step.name} failed with exit code {code}; its messages are above")
        if not step.done():
            where = f" {step.progress()}" if step.progress else ""
            raise Unfinished(f"{step.name} was stopped{where} (exit code 0): the same command goes on from there")
        if step.check:
            step.check()


def _say(step: Step, more: str = "") -> None:
    if step.headline:
        print(f"== {step.headline}{more}", file=sys.stderr, flush=True)


def launch(command: list[str], deadline: float | None = None) -> int:
    """Run a command with its output passed through, and return its exit code.

    It gets a session of its own, so that Ctrl-C in the terminal reaches it as one SIGTERM, at which a training run saves a checkpoint
    and stops. At the deadline it gets one as well, and is killed SECONDS_TO_SAVE later.

    Returns:
        The exit code; 0 for a command that was ended at the deadline.

    Raises:
        KeyboardInterrupt: this process got SIGINT; the command has ended.
        SystemExit: it got SIGTERM or SIGHUP; the code is 128 + signal.
    """
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: Any) -> None:
        received.append(number)
        if process is None:
            return
        if len(received) == 1:
            print("stopping after a checkpoint; a second signal kills", file=sys.stderr, flush=True)
            process.terminate()
        else:
            _kill(process.pid)

    previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        process = subprocess.Popen(command, start_new_session=True)
        if received:
            process.terminate()
        code = _wait(process, deadline)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        if received[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + received[0])
    return code


def _wait(process: subprocess.Popen[bytes], deadline: float | None) -> int:
    try:
        return process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        process.wait(SECONDS_TO_SAVE)
    except subprocess.TimeoutExpired:
        _kill(process.pid)
        process.wait()
    return 0


def _kill(pid: int) -> None:
    """Kill a process and all that it started; torchrun's ranks are in sessions of their own."""
    import psutil  # type: ignore[import-untyped]

    try:
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            process.kill()
    except psutil.NoSuchProcess:
        return
