"""Tables of what a run is rejected for: a row is what it looks at, when it rejects, and what the user is to do. Standard library only.

    Row("sft", is_set, "SFT data are not GPTDataset's: unset --sft")

The start of a run and `exact-megatron doctor` read the same rows, so that they cannot say different things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_UNSET: tuple[Any, ...] = (None, False, 0, "", "None", "none", [], ())


@dataclass(frozen=True)
class Row:
    """One reason to reject a run.

    Attributes:
        looks_at: names of settings, separated by spaces; a dot leads into a block, "data.add_fim".
        rejects: from their values, in this order, whether the run is rejected; a setting that the host lacks is None.
        says: what is wrong and what to do, or a function that makes this of the values.
    """

    looks_at: str
    rejects: Callable[..., Any]
    says: str | Callable[..., str]


def is_set(value: Any) -> bool:
    """Whether an optional setting was given a value that turns it on."""
    return value not in _UNSET


def is_above_1(size: int | None) -> bool:
    """Whether a parallel size divides anything."""
    return (size or 1) > 1


def reasons(rows: Iterable[Row], *sources: Any) -> list[str]:
    """What the rows that reject say; empty is a run that can start.

    Args:
        rows: a table.
        sources: mappings or objects that hold the settings; where several have one, the first counts.
    """
    found = []
    for row in rows:
        values = [value_of(name, *sources) for name in row.looks_at.split()]
        if row.rejects(*values):
            found.append(row.says if isinstance(row.says, str) else row.says(*values))
    return found


def value_of(name: str, *sources: Any) -> Any:
    """The setting of this name in the first source that has it; None where none has."""
    for value in sources:
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
        if value is not None:
            return value
    return None


def refuse(found: list[str]) -> None:
    """Reject the run if there are reasons.

    Raises:
        ValueError: every reason, one a line.
    """
    if found:
        raise ValueError("EXACT refuses this run:\n  " + "\n  ".join(found))


def unmasked(ask: str, accept: str = "model.exact.allow_unmasked_documents=true") -> str:
    """What a user reads who neither asked for masked documents nor accepted unmasked ones; in each host's own words."""
    return (
        "documents in a sample would see each other, and the weights would not measure what a target sees. Ask for masking with "
        f"{ask}, or accept it with {accept}"
    )
