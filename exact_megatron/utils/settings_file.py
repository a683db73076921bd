"""Files of settings, read strictly: what YAML and JSON would let pass in silence is refused with its place."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

MOST_VALUES = 100_000  # of a settings file with its aliases written out; what expands further is an attack or a mistake


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


def yaml_values(path: str | Path) -> dict[Any, Any]:
    """The keys and values of a YAML file; an empty file has none. Numbers and dates are the text that stands there.

    YAML 1.1 reads 010 as 8, 1:30 as 90 and 2024_01_01 as 20240101. What a number is depends on its setting, see config.parse_scalar.

    Raises:
        ValueError: as read_text; it is not YAML, holds a list or a word, gives a key twice or without a value, contains itself, or
            repeats itself by aliases without measure. Names file, line and key.
        OSError: it cannot be read.
    """
    values = _yaml(read_text(path), str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {'list' if isinstance(values, list) else 'scalar'}, not keys and values")
    return values


def yaml_value(text: str, name: str) -> Any:
    """The value in a part of a YAML file, as `yaml_values` reads it; `name` is what errors call it. Raises ValueError."""
    return _yaml(text, name)


def _yaml(text: str, name: str) -> Any:
    import yaml

    try:
        root = yaml.compose(text, Loader=_loader())
        if root is None:
            return None
        _check(name, root, set(), {})
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply to be settings") from None
    try:
        return _loader()("").construct_document(root)
    except (
        yaml.YAMLError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:  # all but the first: PyYAML on !!bool x and the like
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}") from None


@cache
def _loader() -> Any:
    """yaml.SafeLoader, to which a number or a date without quotes is text."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [
                (tag, pattern)
                for tag, pattern in resolvers
                if tag.rpartition(":")[2] not in ("int", "float", "timestamp")
            ]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    return Loader


def _check(name: str, node: Any, above: set[int], sizes: dict[int, int]) -> int:
    """Look at a node and what it holds, at each once; returns how many values it is with its aliases written out."""
    import yaml

    if id(node) in above:
        raise ValueError(f"{name}, line {node.start_mark.line + 1}: an alias makes a value contain itself")
    if id(node) in sizes:
        return sizes[id(node)]
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
        keys = set()
        for key, value in node.value:
            line = (
                f"{name}, line {key.start_mark.line + 1}: {key.value if isinstance(key, yaml.ScalarNode) else 'a key'}"
            )
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise ValueError(f"{line} is given twice in one block: leave one of the two")
                keys.add(key.value)
            if isinstance(value, yaml.ScalarNode) and value.style is None and not value.value:
                raise ValueError(f"{line} has no value: write null for none, or leave the key out")
    above.add(id(node))
    size = 1 + sum(_check(name, child, above, sizes) for child in children)
    above.remove(id(node))
    if size > MOST_VALUES:
        raise ValueError(
            f"{name}, line {node.start_mark.line + 1}: more than {MOST_VALUES:,} values with the aliases written out, which are no settings"
        )
    sizes[id(node)] = size
    return size


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
