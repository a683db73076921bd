"""Commands one after another, each until its result is there: what is done is kept, and the same call goes on after a stop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..config import ExactError
from ..utils.ranks import launch


class Unfinished(ExactError):
    """A step was stopped in order; the same call goes on from there."""


class Failed(ExactError):
    """A step's command ended with `code`."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


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


def run_steps(steps: Sequence[Step]) -> None:
    """Run the steps that are not done, in order.

    Raises:
        Unfinished: a command ended with code 0 and without its result: it was stopped from outside.
        Failed: a command failed.
        ValueError: see Step.check.
        KeyboardInterrupt, SystemExit: see launch.
    """
    for step in steps:
        if step.done() and not (step.again and step.again()):
            _say(step, ": done before")
        else:
            _say(step)
            code = launch(step.command)
            if code:
                raise Failed(step.failed or f"{step.name} failed with exit code {code}; its messages are above", code)
            if not step.done():
                where = f" {step.progress()}" if step.progress else ""
                raise Unfinished(f"{step.name} was stopped{where} (exit code 0): the same command goes on from there")
        if step.check:
            step.check()


def _say(step: Step, more: str = "") -> None:
    if step.headline:
        print(f"== {step.headline}{more}", file=sys.stderr, flush=True)
