"""Results of one suite on one model: DIR/SUITE/results.json and items.jsonl.

items.jsonl gets a line as soon as an item is measured, so that an interrupted run goes on where it was. results.json says with
which settings, model and versions, and is written again, with the summary, at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.environment import environment
from ..utils.files import read_json, write_json

FORMAT = 1
PACKAGES = ("transformers", "lm-eval", "tokenizers")


@dataclass(frozen=True)
class Metric:
    """What a suite's cells hold.

    Attributes:
        title: the suite in tables.
        name: of the value, with its unit.
        tasks: whose cells are averaged; empty for all.
        scale: factor for tables (100 for shares in per cent).
        higher_is_better: or lower, as for a loss.
        pooled: averages weigh cells by what they hold (tokens), instead of equally.
        length: what a cell's length is.
        inclusive: a cell whose length equals the trained length counts as trained. Not so where the prompt is longer than
            the length, as a distance is.
    """

    title: str
    name: str
    tasks: tuple[str, ...] = ()
    scale: float = 1.0
    higher_is_better: bool = True
    pooled: bool = False
    length: str = "length"
    inclusive: bool = True

    def trained(self, length: int | None, trained_length: int) -> bool:
        """Whether a cell of this length lies inside the trained window; a task without lengths does."""
        return length is None or length < trained_length or (self.inclusive and length == trained_length)


@dataclass
class Store:
    """Open results of one suite.

    Attributes:
        folder: DIR/SUITE.
        head: what results.json holds beside the summary: suite, metric, model, settings, notes.
        records: what was measured, by item id.
    """

    folder: Path
    head: dict[str, Any]
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        output: str | Path,
        suite: str,
        metric: Metric,
        model: dict[str, Any],
        settings: dict[str, Any],
        notes: Iterable[str] = (),
    ) -> Store:
        """Begin or go on in `output`/`suite`.

        Args:
            settings: everything that items and scores depend on, as JSON values. `trained_length` may change on the way.
            notes: what a reader of the numbers must know, such as differences to a benchmark's own harness.

        Raises:
            ValueError: the folder holds results of another model or of other settings; or a record that cannot be read.
        """
        folder = Path(output, suite)
        head = {
            "format": FORMAT,
            "suite": suite,
            "metric": metric.__dict__ | {"tasks": list(metric.tasks)},
            "model": model,
            "settings": json.loads(json.dumps(settings)),
            "notes": list(notes),
        }
        before = read_json(folder / "results.json")
        if before:
            changed = {
                f"{part} {key}": (before[part].get(key), head[part].get(key))
                for part in ("model", "settings")
                for key in {**before[part], **head[part]}
                if key not in ("trained_length", "path") and before[part].get(key) != head[part].get(key)
            }
            if changed:
                listed = ", ".join(f"{key}: there {a}, now {b}" for key, (a, b) in sorted(changed.items()))
                raise ValueError(
                    f"{folder} holds results of another run ({listed}): choose another --output or remove it"
                )
        folder.mkdir(parents=True, exist_ok=True)
        store = cls(folder, head)
        store._read()
        write_json(folder / "results.json", head | environment(*PACKAGES) | {"finished": False})
        return store

    def _read(self) -> None:
        path = self.folder / "items.jsonl"
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # the run was killed while it wrote this line
            os.truncate(path, len(whole))
        self.records = {record["id"]: record for record in _parse(whole, path)}

    def add(self, *records: dict[str, Any]) -> None:
        """Append records with id, hash, unit and cells, in one write: all or none of them outlive an interruption.

        Raises:
            ValueError: a cell's sum is not finite.
        """
        for record in records:
            for task, length, total, _ in record["cells"]:
                if not np.isfinite(total):
                    raise ValueError(
                        f"{record['id']} of {self.folder}: {task} at {length} is {total}; it was not recorded"
                    )
        with open(self.folder / "items.jsonl", "a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
        self.records |= {record["id"]: record for record in records}

    def finish(self, summary: dict[str, Any], **more: Any) -> None:
        """Write results.json with the summary."""
        items = digest(sorted((r["id"], r["hash"]) for r in self.records.values()))
        done = {"finished": True, "items": len(self.records), "items_hash": items, "summary": summary}
        write_json(self.folder / "results.json", self.head | environment(*PACKAGES) | done | more)


def read_results(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """results.json and the records of items.jsonl by id.

    Raises:
        ValueError: one is missing or damaged, or the suite is unfinished.
    """
    results = read_json(folder / "results.json")
    if not results.get("finished"):
        state = "is not finished: run the same `exact-megatron evaluate` again" if results else "has no results.json"
        raise ValueError(f"{folder} {state}")
    path = folder / "items.jsonl"
    return results, {record["id"]: record for record in _parse(path.read_bytes(), path)}


def _parse(data: bytes, path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in data.splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove the folder and measure again") from None


def digest(*values: Any) -> str:
    """16 hex digits of JSON values or bytes or arrays of integers."""
    state = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray):
            value = np.ascontiguousarray(value, np.int64).tobytes()
        state.update(value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode())
        state.update(b"\0")
    return state.hexdigest()[:16]


def fingerprint(path: Path) -> str:
    """16 hex digits from the size and 16 blocks of 64 KiB of a file: tells checkpoints apart without reading gigabytes."""
    size = path.stat().st_size
    state = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start in sorted({min(i * size // 16, max(size - 65536, 0)) for i in range(17)}):
            file.seek(start)
            state.update(file.read(65536))
    return state.hexdigest()[:16]
