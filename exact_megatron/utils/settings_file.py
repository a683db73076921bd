"""Files of settings, read strictly: what YAML and JSON would let pass in silence is refused with its place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a settings file.

    Raises:
        ValueError: the name is empty, or the file is not UTF-8.
        OSError: it cannot be read.
    """
    if not str(path):
        raise ValueError("the name of a settings file is empty: is a variable of the shell unset?")
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}: {data[error.start]:#04x})") from None


def yaml_text(path: str | Path) -> str:
    """The text of a YAML file that holds keys and values, or nothing.

    Raises:
        ValueError: as read_text; it is not YAML, holds a list or a word, gives a key twice or without a value, or contains
            itself. Names file, line and key.
        OSError: it cannot be read.
    """
    import yaml

    text = read_text(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            if not isinstance(root, yaml.MappingNode):
                raise ValueError(f"{path} holds a {root.id.replace('sequence', 'list')}, not keys and values")
            _check(path, root, ())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be settings") from None
    return text


def _check(path: str | Path, node: Any, above: tuple[Any, ...]) -> None:
    import yaml

    if node in above:
        raise ValueError(f"{path}, line {node.start_mark.line + 1}: an alias makes a value contain itself")
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check(path, child, (*above, node))
    if not isinstance(node, yaml.MappingNode):
        return
    keys = set()
    for key, value in node.value:
        line = f"{path}, line {key.start_mark.line + 1}: {key.value}"
        if isinstance(key, yaml.ScalarNode):
            if key.value in keys:
                raise ValueError(f"{line} is given twice in one block: leave one of the two")
            keys.add(key.value)
        if isinstance(value, yaml.ScalarNode) and value.style is None and not value.value:
            raise ValueError(f"{line} has no value: write null for none, or leave the key out")
        _check(path, value, (*above, node))


def json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: as read_text; it is not JSON, holds no object, or gives a key twice.
        OSError: it cannot be read.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key in found if [k for k, _ in pairs].count(key) > 1)
            raise ValueError(f"{path}: {twice} is given twice in one object: leave one of the two")
        return found

    text = read_text(path)
    try:
        data = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be settings") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no keys and values")
    return data
