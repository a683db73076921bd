"""Reading the native runner's configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config import parse_scalars, unknown_key
from ..ranges import block_of, range_of, settings, shown
from ..utils.settings_file import yaml_value, yaml_values
from .checks import check
from .schema import ModelConfig, OptimConfig, RopeScalingConfig, RunConfig, has_weights  # noqa: F401, other modules take them from here

ConfigPath = Union[str, Path, Sequence[Union[str, Path]], None]  # noqa: UP007, read by Python 3.10 too

KEYS = tuple(key for key, _, _ in settings(RunConfig))
WITHOUT = {key for key, field, _ in settings(RunConfig) if range_of(field).none and not range_of(field).required}
BLOCKS = {".".join(parts[:n]) for parts in (key.split(".") for key in KEYS) for n in range(1, len(parts))}


def load_config(path: ConfigPath, overrides: list[str] | None = None) -> RunConfig:
    """Read YAML files and `key=value` overrides, and check everything that can be checked without a GPU or data.

    Args:
        path: YAML file; several, of which a later one wins key by key (a list replaces a list); or None for the defaults.
        overrides: `model.exact.enabled=true` and the like; a leading + or ++ (Hydra) is accepted. Of two for one key the
            later wins.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown key (named with the nearest known one), a key without a value or twice in a file, a value out of
            its range (see schema.py), or settings that do not fit together (see checks.py).
    """
    given: dict[str, Any] = {}
    for file in config_paths(path):
        given = _merge(given, _read_file(file))
    for override in overrides or []:
        _override(given, override)
    # Interpolations, ${model.seed}, may name any setting, given or not.
    everything = _merge(dataclasses.asdict(RunConfig()), given)
    try:
        values = OmegaConf.to_container(OmegaConf.create(everything), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}") from error
    config = _build(RunConfig, values)
    check(config)
    return config  # type: ignore[no-any-return]


def config_paths(path: ConfigPath) -> list[str]:
    """The files of `load_config`, in order."""
    if path is None:
        return []
    return [str(path)] if isinstance(path, (str, Path)) else [str(p) for p in path]


def _read_file(path: str) -> dict[str, Any]:
    given = yaml_values(path)
    try:
        _refuse_unknown(given)
        return _plain(given)  # type: ignore[no-any-return]
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def _override(given: dict[str, Any], override: str) -> None:
    """Put `key=value` into the settings; a list or mapping replaces the one that is there."""
    key, equals, text = override.lstrip("+").partition("=")
    key = key.strip()
    if not equals or not key:
        raise ValueError(f"expected key=value, got {override!r}")
    *blocks, name = key.split(".")
    value = {name: _value(key, text)}
    for block in reversed(blocks):
        value = {block: value}
    _refuse_unknown(value)
    for block in blocks:
        given = given.setdefault(block, {})
        value = value[block]
        if not isinstance(given, dict):  # a list in the file, and by split here
            raise ValueError(f"{key}={text}: {block} holds no keys in what was read before, give it as a whole")
    given.update(value)


def _value(key: str, text: str) -> Any:
    """The value of an override, read as YAML.

    Raises:
        ValueError: there is none, or it is not YAML.
    """
    if not text.strip():
        remedy = f"Write {key}=null for none" if key in WITHOUT else "Give it one, or leave the setting out"
        raise ValueError(f"{key}= has no value: is a variable of the shell unset? {remedy}")
    value = yaml_value(text, f"{key}={text if len(text) <= 80 else text[:77] + '...'}")
    try:
        value = _plain({"value": value})["value"]
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ValueError(f"{key}={shown(text)}: {' '.join(str(error).split())}") from error
    if value is None and text.strip() not in ("null", "Null", "NULL", "~"):
        raise ValueError(f"{key}={text} has no value: write {key}=null for none")
    return value


def _plain(values: Any) -> Any:
    """The values, if OmegaConf takes them: plain ones, and ${...} that it can parse."""
    return OmegaConf.to_container(OmegaConf.create(values), resolve=False)


def _refuse_unknown(given: dict[Any, Any], prefix: str = "") -> None:
    for name, value in given.items():
        key = f"{prefix}{name}"
        if "." in str(name):
            raise ValueError(f"{key} has dots in a file or in braces: write it as blocks, {_as_blocks(key)}")
        if key in BLOCKS:
            if not isinstance(value, dict):
                raise ValueError(f"{key}={shown(parse_scalars(value))} is not a block of keys and values")
            _refuse_unknown(value, key + ".")
        elif key not in KEYS:
            raise ValueError(unknown_key(key, KEYS))


def _as_blocks(key: str) -> str:
    *blocks, name = key.split(".")
    return "".join(f"{block}: {{" for block in blocks) + f"{name}: ..." + "}" * len(blocks)


def _merge(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{key: _merge(base.get(key), value) for key, value in over.items()}}


def _build(block: type, values: Any, prefix: str = "") -> Any:
    """The dataclass of a block of settings from all its values.

    Raises:
        ValueError: one is out of its range.
    """
    made = {}
    for field in dataclasses.fields(block):
        key = prefix + field.name
        value = values[field.name]
        inner = block_of(field)
        if inner:
            made[field.name] = _build(inner, value, key + ".")
            continue
        allowed = range_of(field)
        if not allowed.text:
            value = parse_scalars(value)
        made[field.name] = allowed.accept(key, value)
    return block(**made)


def parse_blend(entries: Any) -> tuple[list[str], list[float] | None]:
    """Read PREFIX, [prefix, ...] or [weight, prefix, weight, prefix, ...] as NeMo and Megatron-LM do.

    Raises:
        ValueError: a weight that is not above 0.
    """
    entries = entries if isinstance(entries, list) else [entries]
    if has_weights(entries):
        weights = [float(e) for e in entries[::2]]
        if min(weights) <= 0:
            raise ValueError(
                f"model.data.data_prefix gives {entries[1::2]} the weights {weights}: each must be above 0"
            )
        return [str(e) for e in entries[1::2]], weights
    return [str(e) for e in entries], None
