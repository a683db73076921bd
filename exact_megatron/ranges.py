"""Kinds and ranges of settings, written on the line of the dataclass field that they hold for. Standard library only.

    max_steps: int = whole(1000, least=1)
    precision: str = choice("32", ["32", "bf16"])

A setting whose default is None takes null (none) too. The empty string is no value of any setting.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

LARGEST_INT = 2**31 - 1  # what the int32 fields of Megatron and the C libraries below it hold
LARGEST_FLOAT = 3.4028234663852886e38  # float32: beyond, a setting is infinite where it is used
SMALLEST_EPS = 1e-30  # below, a float32 sum of squares plus epsilon may be 0
LONGEST_WINDOW = 2**27  # tokens; tables have an entry for each effective context

_FLAGS = {True: "true", False: "false", None: "null"}


@dataclasses.dataclass(frozen=True)
class Range:
    """What one setting may be.

    Attributes:
        words: the range as an error names it: "a whole number of at least 1".
        read: takes a value and returns it in the setting's own type; raises TypeError or ValueError where it is not in range.
        none: None is a value too.
        text: the values are text. Text for any other setting is read as a number, true, false or null first.
        required: None only stands for "not given yet"; training/checks.py refuses it.
    """

    words: str
    read: Callable[[Any], Any]
    none: bool
    text: bool
    required: bool = False

    def accept(self, key: str, value: Any) -> Any:
        """The value in the setting's own type.

        Raises:
            ValueError: it is not in range; names the key, the value and the range.
        """
        if value is None and self.none:
            return None
        words = f"{self.words}{', or null for none' if self.none and not self.required else ''}"
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{key} is empty, not {words}")
        try:
            return self.read(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{key}={shown(value)} is not {words}{self._hint(value)}") from None

    def _hint(self, value: Any) -> str:
        if isinstance(value, (int, float)) and LARGEST_FLOAT < abs(value) < math.inf:
            return f" (float32 holds {LARGEST_FLOAT:.3g} at most)"
        if self.text or not isinstance(value, str):
            return ""
        if re.fullmatch(r"\d+\s*[kKmMgG]", value):
            return ", written in digits"
        if re.fullmatch(r"[-+]?(0[\dxob][\da-fA-F_]*|\d+(:\d+)+)", value):  # YAML 1.1 has 010 and 1:30 for 8 and 90
            return ", written in decimal digits that do not begin with 0"
        return ""


def shown(value: Any) -> str:
    """A value as an error names it; a long one is cut."""
    text = _FLAGS[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def range_of(field: dataclasses.Field[Any]) -> Range:
    """The range that the field was declared with.

    Raises:
        KeyError: with none.
    """
    return field.metadata["range"]  # type: ignore[no-any-return]


def settings(block: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """(key, field, value) of every setting of a block (a dataclass, or an instance of one) and of the blocks in it.

    The value of a dataclass that is no instance is the field's default.
    """
    for field in dataclasses.fields(block):
        key = prefix + field.name
        section = block_of(field)
        if section:
            yield from settings(section if isinstance(block, type) else getattr(block, field.name), key + ".")
        else:
            yield key, field, default_of(field) if isinstance(block, type) else getattr(block, field.name)


def block_of(field: dataclasses.Field[Any]) -> Any:
    """The dataclass of a field that holds a block of settings; None for a setting."""
    return field.default_factory if dataclasses.is_dataclass(field.default_factory) else None


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def setting(default: Any, words: str, read: Callable[[Any], Any], text: bool = False, required: bool = False) -> Any:
    """A field of a kind of its own; see Range for `words` and `read`."""
    metadata = {"range": Range(words, read, default is None, text, required)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def switch(default: bool | None) -> Any:
    """true or false; a number is neither."""
    return setting(default, "true or false", _switch)


def whole(default: int | None, least: int, most: int = LARGEST_INT, also: Sequence[int] = ()) -> Any:
    """A whole number in least..most, or one of `also`. 4.0 and 1e3 are whole numbers."""

    def read(value: Any) -> int:
        number = _real(value)
        if number != int(number) or not (least <= number <= most or number in also):
            raise ValueError
        return int(number)

    words = f"a whole number of at least {least}" if most == LARGEST_INT else f"a whole number in {least}..{most}"
    return setting(default, " or ".join([*map(str, also), words]), read)


def number(
    default: float | None,
    least: float | None = None,
    most: float = LARGEST_FLOAT,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A finite number that float32 holds, with least <= number <= most, above < number and number < below."""

    def read(value: Any) -> float:
        found = float(_real(value))
        inside = (least is None or least <= found) and found <= most and -LARGEST_FLOAT <= found
        if not inside or (above is not None and found <= above) or (below is not None and found >= below):
            raise ValueError
        return found

    bounds = [
        f"of at least {least:g}" if least is not None else f"above {above:g}" if above is not None else "",
        f"below {below:g}" if below is not None else f"at most {most:g}" if most != LARGEST_FLOAT else "",
    ]
    return setting(default, f"a finite number {' and '.join(b for b in bounds if b)}".rstrip(), read)


def choice(default: str | None, allowed: Sequence[str]) -> Any:
    """One of these words; 32 is "32"."""

    def read(value: Any) -> str:
        if _text(value) not in allowed:
            raise ValueError
        return str(value)

    return setting(default, f"one of {', '.join(allowed)}", read, text=True)


def text(default: str | None, words: str = "text that is not empty", pattern: str = r"(?s).*\S.*") -> Any:
    """Text that is not empty and matches the whole pattern; a number stands for its digits."""

    def read(value: Any) -> str:
        if not re.fullmatch(pattern, _text(value)):
            raise ValueError
        return str(value)

    return setting(default, words, read, text=True)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _real(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        _real(value)
    found = str(value)
    if "\0" in found:
        raise ValueError
    return found
