"""Forks of Megatron-LM: loss functions of any name and place, and guards that no fork trains past without weights."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ..config import ExactError
from ..loss import ExactLoss
from .hooks import file_of, replaced

WAY_OUT = "see docs/hosts.md, Forks"
HOOK = "exact_megatron.integrations.megatron_lm.hook"
MARKED: list[Any] = []  # what `hook` returned in this process


def hook(loss_func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: this loss function is the one to weight, whatever it is called and wherever it is imported from.

    Without EXACT it is called as it is. Where one function is marked, EXACT hooks marked ones alone, and no global `loss_func`.

    Args:
        loss_func: a function, or functools.partial of one, that takes (loss_mask, output_tensor, ...), see ExactLoss.wrap.
    """
    if any(target_of(loss_func) is marked for marked in MARKED):
        return loss_func

    @functools.wraps(loss_func)
    def marked(*args: Any, **kwargs: Any) -> Any:
        return marked.runs(*args, **kwargs)  # type: ignore[attr-defined]

    marked.runs = loss_func  # type: ignore[attr-defined]
    MARKED.append(marked)
    return marked


def target_of(function: Any) -> Any:
    """What a partial calls in the end."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def name_of(function: Any) -> str:
    """Name and file of a function, for messages."""
    function = target_of(function)
    return f"{getattr(function, '__qualname__', repr(function))} in {file_of(function)}"


def followed(
    returned: Callable[..., Any], hooked: Sequence[Any], loss: ExactLoss, forward_step: Callable[..., Any]
) -> Callable[..., Any]:
    """The loss function that a forward step returned, known to run a hooked one.

    Args:
        returned: takes the output tensor. A partial of a hooked function is returned as it is. Whether another callable runs one shows
            when it is called, on the last pipeline stage.
        hooked: the functions that were hooked.
        loss: their hook.
        forward_step: for messages.

    Raises (a callable that is no partial: when it is called):
        ExactError: it is a partial of another function, or ran none that is hooked.
    """

    def wrong() -> ExactError:
        return ExactError(
            f"{name_of(forward_step)} returned the loss function {name_of(returned)}, which EXACT has not hooked: it would take the "
            f"weights for a mask. Decorate it with {HOOK} ({WAY_OUT})"
        )

    if isinstance(returned, functools.partial):
        if not any(target_of(returned) is function for function in hooked):
            raise wrong()
        return returned

    @functools.wraps(returned)
    def counted(*args: Any, **kwargs: Any) -> Any:
        before = loss.calls
        result = returned(*args, **kwargs)
        if loss.calls == before:
            raise wrong()
        return result

    return counted


@contextmanager
def guarded(may_step: Callable[[], None]) -> Iterator[None]:
    """Within the block megatron.core's get_forward_backward_func, which every training loop asks for its schedule, first calls
    `may_step`: in its module, in all modules that have imported it, and in those that will."""
    from megatron.core.pipeline_parallel import schedules

    stock = schedules.get_forward_backward_func

    @functools.wraps(stock)
    def guard(*args: Any, **kwargs: Any) -> Any:
        may_step()
        return stock(*args, **kwargs)

    with ExitStack() as stack:
        for module in list(sys.modules.values()):
            for name in [name for name, value in getattr(module, "__dict__", {}).items() if value is stock]:
                stack.enter_context(replaced(module, name, guard))
        yield
