"""Errors of the file system that say which file."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def write_json(path: str | Path, value: Any) -> None:
    Path(f"{path}.tmp").write_text(json.dumps(value, indent=2) + "\n")
    os.replace(f"{path}.tmp", path)


def read_json(path: str | Path) -> Any:
    """The parsed file, or {} where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
