"""The YAML of a study: bases, seeds of the data, arms, what is evaluated. What it may hold is in configs/study.yaml."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import as_mapping, parse_scalars, unknown_key
from ..utils.settings_file import yaml_values
from .runs import BASELINE, Arm

DATA = ("same", "upsample")


@dataclass(frozen=True)
class StudyArm:
    """One way to train.

    Attributes:
        name: its folder, and what tables call it.
        exact: settings of model.exact; None: without weights.
        longce: K of LongCE in tokens (study/longce.py); None: not LongCE.
        upsample: the arm whose weighted share of the tail this one reaches by drawing long documents more often; None: same data.
    """

    name: str
    exact: dict[str, Any] | None = None
    longce: int | None = None
    upsample: str | None = None

    def as_arm(self) -> Arm:
        if self.exact is None:
            return Arm(self.name, ["model.exact.enabled=false"])
        own = [f"model.exact.{key}={setting_text(value)}" for key, value in self.exact.items()]
        return Arm(self.name, ["model.exact.enabled=true", *own])


@dataclass(frozen=True)
class Gate:
    """What a base must be able to do for its arms to count: a share of `accuracy` right answers where the evidence is less than `below`
    tokens back."""

    accuracy: float
    below: int


@dataclass(frozen=True)
class Task:
    """Data of the built-in task (study/task.py), in tokens."""

    median: float = 100
    sigma: float = 1.15
    longest: int = 4096
    base_tokens: int = 2_500_000
    tokens: int = 700_000


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        folder: of its data, runs and report.
        config: YAML files of the native runner, for all runs.
        settings: `key=value` over them, for all runs.
        base_settings, arm_settings: `key=value` over those, for the bases, and for the arms.
        bases: seeds of the bases.
        seeds: of the arms' data and order; every arm is trained for each pair of a base and a seed.
        gate: None: all bases count.
        arms: `baseline` first.
        ranges: name -> (least, most) distance of the evidence in tokens that a row of the table takes together.
        task, documents, prompts: the data, and how many of the two kinds of held-out ones (study/evaluate.py).
    """

    folder: Path
    config: list[str]
    settings: list[str]
    base_settings: list[str]
    arm_settings: list[str]
    bases: list[int]
    seeds: list[int]
    arms: list[StudyArm]
    ranges: dict[str, tuple[int, int]]
    gate: Gate | None = None
    task: Task = field(default_factory=Task)
    documents: int = 40
    prompts: int = 40

    def arm(self, name: str) -> StudyArm:
        return next(arm for arm in self.arms if arm.name == name)


def read_study(path: str | Path, folder: str | None = None) -> Study:
    """Read a study's YAML; relative paths of `config` are beside it.

    Args:
        folder: in place of the file's.

    Raises:
        FileNotFoundError: the file, or one that it names.
        ValueError: unknown keys, values of another kind, no baseline, an arm of no kind; names key and value.
    """
    given = parse_scalars(yaml_values(path))
    known = [f.name for f in dataclasses.fields(Study)]
    _only(given, known, "")
    for key in ("folder", "config", "bases", "seeds", "arms", "ranges"):
        if key not in given and not (key == "folder" and folder):
            raise ValueError(f"{path}: a study needs {key}")
    files = [str(Path(path).parent / name) for name in _list(given["config"], "config", str)]
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"{path}: config names {file}, which does not exist")
    settings: dict[str, Any] = {
        key: _settings(given.get(key), key) for key in ("settings", "base_settings", "arm_settings")
    }
    arms = [_arm(str(name), value) for name, value in as_mapping("arms", given["arms"]).items()]
    if [arm.name for arm in arms[:1]] != [BASELINE] or arms[0] != StudyArm(BASELINE):
        raise ValueError(f"{path}: the first arm must be {BASELINE}, without settings: the others are compared with it")
    for arm in arms:
        if arm.upsample is not None and (arm.upsample not in [a.name for a in arms if a.exact is not None]):
            raise ValueError(f"{path}: arms.{arm.name}.upsample={arm.upsample} is no arm that model.exact weights")
    gate = given.get("gate")
    return Study(
        folder=Path(folder or given["folder"]),
        config=files,
        bases=_seeds(given["bases"], "bases"),
        seeds=_seeds(given["seeds"], "seeds"),
        arms=arms,
        ranges={name: _range(name, value) for name, value in as_mapping("ranges", given["ranges"]).items()},
        gate=None if gate is None else _block(Gate, gate, "gate"),
        task=_block(Task, given.get("task"), "task"),
        documents=_whole(given.get("documents", Study.documents), "documents"),
        prompts=_whole(given.get("prompts", Study.prompts), "prompts"),
        **settings,
    )


def _only(given: Mapping[str, Any], known: list[str], prefix: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(unknown_key(f"{prefix}{key}", [prefix + name for name in known]))


def _arm(name: str, value: Any) -> StudyArm:
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"the arm {name!r}: letters, digits, dots, dashes and underscores make a folder's name")
    block = as_mapping(f"arms.{name}", value)
    _only(block, ["exact", "longce", "upsample"], f"arms.{name}.")
    if len(block) > 1:
        raise ValueError(f"arms.{name} is {' and '.join(block)}: an arm differs from the baseline in one thing")
    if "exact" in block:
        return StudyArm(name, exact=as_mapping(f"arms.{name}.exact", block["exact"]))
    if "longce" in block:
        short = _whole(block["longce"], f"arms.{name}.longce")
        if short % 2:
            raise ValueError(f"arms.{name}.longce={short} must be even: half of it is the least that a target sees")
        return StudyArm(name, longce=short)
    return StudyArm(name, upsample=None if "upsample" not in block else str(block["upsample"]))


def _block(kind: Any, value: Any, name: str) -> Any:
    block = as_mapping(name, value)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    _only(block, list(fields), f"{name}.")
    missing = [key for key, f in fields.items() if key not in block and f.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}")
    for key, entry in block.items():
        wanted = int if "int" in str(fields[key].type) else (int, float)
        if isinstance(entry, bool) or not isinstance(entry, wanted) or not 0 < entry < 1e15:
            raise ValueError(f"{name}.{key}={entry} is not a number above 0")
    return kind(**block)


def _settings(value: Any, name: str) -> list[str]:
    return [f"{key}={setting_text(entry)}" for key, entry in as_mapping(name, value).items()]


def setting_text(value: Any) -> str:
    """As on a command line, `key=value`."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _list(value: Any, name: str, kind: type) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in values):
        raise ValueError(f"{name}={value} is not a list of {'names' if kind is str else 'whole numbers'}")
    return values


def _seeds(value: Any, name: str) -> list[int]:
    seeds = _list(value, name, int)
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"{name}={seeds} must be different numbers of at least 0")
    return seeds


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value} is not a whole number of at least 1")
    return value


def _range(name: str, value: Any) -> tuple[int, int]:
    low, high = (*_list(value, f"ranges.{name}", int), None, None)[:2]
    if low is None or high is None or len(value) != 2 or not 0 < low <= high:
        raise ValueError(f"ranges.{name}={value} is not [least, most] in tokens")
    return low, high
