"""The one place that takes EXACT's settings out of a host's command line. Standard library only.

Hosts drop or reject what they do not know (Megatron-LM's argparse fails, Megatron-Bridge drops with a log line), so the
settings are removed, checked against ExactConfig and merged before the host sees its arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config import (
    PREFIX,
    TIMING_PREFIX,
    ExactConfig,
    QKTimingConfig,
    as_mapping,
    parse_scalar,
    parse_scalars,
    split_overrides,
    unknown_key,
)
from ..ranges import range_of
from ..utils.settings_file import json_object, yaml_values

FLAG = "--exact-"
ENVIRONMENT = "EXACT_"
# EXACT_CONFIG names a file, EXACT_WARNINGS is the command's, EXACT_SLURM the tests'
NOT_SETTINGS = frozenset({"EXACT_CONFIG", "EXACT_WARNINGS", "EXACT_SLURM"})
KEYS = tuple(field.name for field in dataclasses.fields(ExactConfig))
TIMING_KEYS = tuple(field.name for field in dataclasses.fields(QKTimingConfig))
RANGES = {field.name: range_of(field) for field in dataclasses.fields(ExactConfig)}
SWITCHES = tuple(field.name for field in dataclasses.fields(ExactConfig) if isinstance(field.default, bool))


def take_settings(arguments: Iterable[str], environment: Mapping[str, str]) -> tuple[ExactConfig, list[str]]:
    """Part a host's command line into EXACT's settings and the host's own arguments.

    As `given_settings`, with the defaults for what is not given.
    """
    values, rest = given_settings(arguments, environment)
    return ExactConfig.from_mapping(values), rest


def given_settings(arguments: Iterable[str], environment: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The settings that somebody gave, for hosts whose own configuration holds others.

    Later wins: the file (--exact-config FILE or EXACT_CONFIG), then EXACT_ALPHA and the like, then the command line
    (`model.exact.alpha=0.2`, also with + or ++; --exact-alpha 0.2; --exact-enabled alone is true) in its order.

    Args:
        arguments: the command line without the program's name; EXACT's may stand anywhere.
        environment: os.environ.

    Returns:
        The settings {"alpha": 0.2}, valid ones, and the other arguments in order.

    Raises:
        ValueError: an unknown key in any of the four places, with the nearest known one; a flag or variable without its value;
            a value out of its range; a file that holds no settings.
        FileNotFoundError: the file is not there.
    """
    given, rest = [], []
    file = _file_of_environment(environment)
    arguments = list(arguments)
    while arguments:
        argument = arguments.pop(0)
        if split_overrides([argument])[0]:
            given.append(argument)
        elif argument.startswith(FLAG):
            name, equals, value = argument.removeprefix(FLAG).partition("=")
            key = name.replace("-", "_")
            if key not in (*KEYS, "config"):
                raise ValueError(unknown_key(FLAG + name, [FLAG + k.replace("_", "-") for k in (*KEYS, "config")]))
            if not equals:
                value = _value_after(FLAG + name, key, arguments)
            if not value.strip():
                raise ValueError(f"{FLAG}{name} needs a value, and got an empty one: is a variable of the shell unset?")
            if key == "config":
                file = value
            else:
                given.append(f"{PREFIX}{key}={value}")
        else:
            rest.append(argument)
    values = read_settings(file) if file else {}
    values.update(_from_environment(environment))
    config = ExactConfig.from_overrides(given, base=values).to_dict()
    named = {*values, *(override.lstrip("+").partition("=")[0].removeprefix(PREFIX) for override in given)}
    return {key: config[key] for key in KEYS if key in named}, rest


def _value_after(flag: str, key: str, arguments: list[str]) -> str:
    if key in SWITCHES:
        return arguments.pop(0) if arguments and isinstance(parse_scalar(arguments[0]), bool) else "true"
    if not arguments or arguments[0].startswith("--"):
        raise ValueError(f"{flag} needs a value")
    return arguments.pop(0)


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for name, text in environment.items():
        if name.startswith(ENVIRONMENT) and name not in NOT_SETTINGS:
            key = name.removeprefix(ENVIRONMENT).lower()
            if key not in KEYS:  # a misspelled setting must not be a run without it
                raise ValueError("environment: " + unknown_key(name, [ENVIRONMENT + k.upper() for k in KEYS]))
            values[key] = RANGES[key].accept(name, parse_scalar(text))
    return values


def _file_of_environment(environment: Mapping[str, str]) -> str | None:
    file = environment.get("EXACT_CONFIG")
    if file is not None and not file.strip():
        raise ValueError("EXACT_CONFIG is empty: name the file of settings, or unset it")
    return file


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read a block of settings from YAML or JSON: a whole run's file with model.exact, one with exact, or the block alone.

    A file with query/key timing only, model.qk_timing or qk_timing, is an empty block.

    Raises:
        ValueError: the file is no mapping, or holds other things but no such block.
        FileNotFoundError: there is no such file.
    """
    data = _load(path)
    if "model" in data:
        model = as_mapping(f"{path}: model", data["model"])
        if not {"exact", "qk_timing"} & set(model):
            raise ValueError(f"{path} has no model.exact")
        data = {"exact": model.get("exact")}
    if set(data) == {"qk_timing"}:
        return {}
    return read_block(data["exact"] if "exact" in data else data)


def _load(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--exact-config {path}: there is no such file")
    if path.suffix == ".json":
        return json_object(path)
    data = yaml_values(path)
    if not data:
        raise ValueError(
            f"{path} holds no settings: expected a mapping with model.exact, exact, or the settings themselves"
        )
    return data


def take_timing(
    arguments: Iterable[str], environment: Mapping[str, str], base: Mapping[str, Any] | None = None
) -> tuple[QKTimingConfig, list[str]]:
    """Part a host's command line into the settings of query/key timing and the rest, --exact-config FILE among it.

    Later wins: defaults, then `base`, then model.qk_timing (or qk_timing) of the file, then `model.qk_timing.scale=0.5` on the line.

    Args:
        arguments, environment: as for take_settings, which comes after this.
        base: settings that the host's own configuration holds, {"enabled": True}.

    Raises:
        ValueError: an unknown key, with the nearest known one; a value of the wrong kind; a file that holds no settings.
        FileNotFoundError: the file is not there.
    """
    given, rest = split_overrides(arguments, TIMING_PREFIX)
    file = _file_of_environment(environment)
    for argument, following in zip(rest, [*rest[1:], ""]):
        name, equals, value = argument.partition("=")
        if name == f"{FLAG}config":
            file = value if equals else following
    values = dict(base or {})
    if file:
        data = _load(file)
        data = as_mapping(f"{file}: model", data["model"]) if "model" in data else data
        values.update(read_block(data.get("qk_timing"), TIMING_PREFIX))
    return QKTimingConfig.from_overrides(given, base=values), rest


def read_block(block: Mapping[str, Any] | None, prefix: str = PREFIX) -> dict[str, Any]:
    """A block of settings of a YAML file as values; its numbers are text still.

    Raises:
        ValueError: it is a list, a word or a number.
    """
    values = as_mapping(prefix.rstrip("."), block)
    return {key: parse_scalars(value) for key, value in values.items()}
