"""Replacing parts of a host for as long as it trains, and finding the parts that its scripts use by name."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, ModuleType
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


def functions_of(source: str) -> dict[str, CodeType]:
    """A script's own functions by name, not executed: what `script_global` and `takes_loss` will see of them.

    Raises:
        SyntaxError: it is no Python.
    """
    found = compile(source, "script", "exec").co_consts
    return {code.co_name: code for code in found if isinstance(code, CodeType)}


def takes_loss(parameters: Sequence[str]) -> bool:
    """Whether a function with these parameters is a loss that ExactLoss can wrap."""
    return tuple(parameters[:2]) == ("loss_mask", "output_tensor")


def file_of(function: Any) -> str:
    """Name of the file that a function, or a partial of it, comes from, for messages."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(inspect.unwrap(function), "__code__", None)
    return os.path.basename(code.co_filename) if code else repr(function)


def when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call `act(module)`: now if module `name` is imported already, else right after its import, before anyone uses it.

    So a host is hooked without being imported earlier than its own script would have, which may set the environment first.
    """
    if name in sys.modules:
        act(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, act))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module as it would be found without this finder, and acts when it has been executed."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self.name, self.act = name, act
        self.asking = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:  # until then: a spec may be asked for without an import, or an import fail
                sys.meta_path.remove(self)
                self.act(module)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec
