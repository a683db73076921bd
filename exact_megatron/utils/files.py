"""Reading and writing files, with errors that say which file."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .settings_file import json_object

STDOUT = "standard output"  # what an error calls it


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name `path` in an error of the file system that does not: a write to a full disk only knows its descriptor.

    Errors of other kinds (safetensors, torch's CheckpointException) become OSErrors where they say that the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    except BaseException as error:  # torch's CheckpointException is no Exception
        for code in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(code) in str(error):
                raise OSError(code, os.strerror(code), os.fspath(path)) from error
        raise


def changed_settings(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings in which two nested configurations differ: {"model.seed": (value in one, value in other)}."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in {**one, **other}:
        a = one.get(key)
        b = other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed.update(changed_settings(a, b, f"{prefix}{key}."))
        elif a != b:
            changed[f"{prefix}{key}"] = (a, b)
    return changed


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file whole or not at all; an OSError names it. What is no regular file (/dev/stdout) is written to directly."""
    path = os.path.realpath(path)  # a link stays one
    direct = os.path.exists(path) and not os.path.isfile(path)
    target = path if direct else f"{path}.tmp"
    try:
        with writing(path):
            Path(target).write_text(text, "utf-8")
            if not direct:
                os.replace(target, path)
    except BaseException:
        if not direct:
            Path(target).unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no such file. Raises ValueError, naming it, where it is damaged."""
    try:
        return json_object(path)
    except FileNotFoundError:
        return {}


def json_lines(path: str | os.PathLike[str]) -> list[Any]:
    """The values of a file with one in each line, none where there is no file.

    Raises:
        ValueError: a line is no JSON; names it.
    """
    found = []
    for number, line in enumerate(Path(path).read_text().splitlines() if Path(path).exists() else [], 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON ({error}): remove the line, it was cut off") from error
    return found
