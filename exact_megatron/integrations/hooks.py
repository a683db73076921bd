"""Replacing parts of a host for as long as it trains, and finding the parts that its scripts use by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..config import ExactError


@contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Within the block `owner` (a class, a module or a function's globals) has `new` under `name`.

    Raises:
        ExactError: there is nothing of that name.
    """
    globals_ = owner if isinstance(owner, dict) else None
    old = (globals_ or vars(owner)).get(name)
    if old is None:
        raise ExactError(
            f"{getattr(owner, '__name__', 'the script')} has no {name}: this is not a host that EXACT knows"
        )
    put = globals_.__setitem__ if globals_ is not None else lambda key, value: setattr(owner, key, value)
    put(name, new)
    try:
        yield
    finally:
        put(name, old)


def script_global(function: Any, name: str) -> Any:
    """The global that a function of the user's script calls by this name.

    Raises:
        ExactError: it uses no such name, so that replacing it would change nothing.
    """
    inner = inspect.unwrap(function)
    code = getattr(inner, "__code__", None)
    if code is None or name not in code.co_names or name not in inner.__globals__:
        raise ExactError(
            f"{getattr(inner, '__name__', repr(inner))} in {file_of(inner)} does not use a global {name}, as the host's own scripts "
            "do: EXACT cannot hook this script"
        )
    return inner.__globals__[name]


def file_of(function: Any) -> str:
    """Name of the file that a function comes from, for messages."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return os.path.basename(code.co_filename) if code else repr(function)
