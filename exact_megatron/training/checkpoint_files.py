"""Checkpoints of a run as files: which there are, what was written into them, and which of them are damaged.

`checksums.json` in a checkpoint says what was written: size and CRC-32 of every file, by which later damage is found.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_STEP = re.compile(r"step_(\d+)$")


CHECKSUMS = "checksums.json"


_ALWAYS = (
    ".metadata",
    "metadata.json",
)  # files of every checkpoint; the state is in common.pt up to megatron.core 0.18


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = Path(run_dir, "checkpoints").glob("step_*")
    return sorted((p for p in found if _STEP.fullmatch(p.name)), key=lambda p: int(p.name.split("_")[1]))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at `path`: itself, or the newest of a run directory.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if _STEP.fullmatch(path.name) and (path / "metadata.json").is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise FileNotFoundError(
            f"no checkpoint at {path}: give a run directory with checkpoints/step_N, or such a folder itself"
        )
    return found[-1]


def _checksum(path: Path) -> tuple[int, str]:
    """Size in bytes and CRC-32 (hexadecimal) of a file."""
    size = 0
    crc = 0
    block = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            crc = zlib.crc32(memoryview(block)[:count], crc)
            size += count
    return size, f"{crc:08x}"


def _checksums(paths: list[Path]) -> dict[str, tuple[int, str]]:
    with ThreadPoolExecutor(4) as threads:  # zlib releases the GIL
        return dict(zip([path.name for path in paths], threads.map(_checksum, paths)))


def write_checksums(path: Path) -> None:
    """Write `checksums.json` for the files of a new checkpoint. Call it on all ranks: each reads what it wrote, from its page cache."""
    ranks = _ranks()
    writer = re.compile(r"__(\d+)_\d+\.distcp")
    # A rank lists a folder of a shared file system late: what others wrote is theirs.
    owners = {f: int(match[1]) if (match := writer.fullmatch(f.name)) else 0 for f in path.iterdir()}
    mine = [f for f, owner in owners.items() if owner == ranks[0] and f.name != CHECKSUMS]
    parts = _gathered(_checksums(sorted(mine)))
    if ranks[0] == 0:
        files = dict(sorted(entry for part in parts for entry in part.items()))
        (path / CHECKSUMS).write_text(json.dumps({"algorithm": "crc32", "files": files}, indent=1) + "\n")


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, by its checksums.json; None: nothing.

    Of a checkpoint without that file (an older version's) only the names are known. Call it on all ranks: each reads a share.
    """
    return next(filter(None, _gathered(_damage_of_share(path, *_ranks()))), None)


def _damage_of_share(path: Path, rank: int, world: int) -> str | None:
    for name in _ALWAYS:
        if not (path / name).is_file():
            return f"{path / name} is missing"
    if not (path / CHECKSUMS).is_file():
        return None
    try:
        files = json.loads((path / CHECKSUMS).read_text())["files"]
        known = {str(name): (int(size), str(crc)) for name, (size, crc) in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path / CHECKSUMS} is not what was written"
    if unlisted := set(_ALWAYS) - known.keys():
        return f"{path / CHECKSUMS} does not list {', '.join(sorted(unlisted))}"
    for name, (size, _) in sorted(known.items()):  # the quick look first
        if not (path / name).is_file():
            return f"{path / name} is missing"
        if (path / name).stat().st_size != size:
            return f"{path / name} has {(path / name).stat().st_size} bytes, {size} were written"
    share = sorted(known, key=lambda name: known[name])[rank::world]
    found = _checksums([path / name for name in share])
    return next(
        (f"{path / name} holds other bytes than were written" for name in share if found[name] != known[name]), None
    )


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that it is none: step_N.damaged."""
    aside = path.with_name(path.name + ".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def refuse_damaged(path: Path) -> None:
    """Raise ValueError for a checkpoint that is not whole, with the newest older one that is. Call it on all ranks."""
    if problem := damage(path):
        others = [p for p in reversed(checkpoints(path.parent.parent)) if p != path]
        whole = next((p for p in others if damage(p) is None), None)
        raise ValueError(
            f"the checkpoint {path} is damaged: {problem}. "
            + (
                f"{whole} is whole: name that one"
                if whole
                else "No other checkpoint beside it is whole: fetch or make it again"
            )
        )


def newest_whole(run_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint of a run (None: there is no checkpoint), and the damage of those after it. Call it on all ranks.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints(run_dir)):
        problem = damage(path)
        if problem is None:
            return path, damaged
        damaged[path] = problem
    if damaged:
        raise ValueError(
            f"no checkpoint of {run_dir} is whole: {'; '.join(damaged.values())}. Put a whole one there, or remove "
            f"{', '.join(map(str, damaged))} to start anew"
        )
    return None, damaged


def _ranks() -> tuple[int, int]:
    """This rank and their number; (0, 1) without a process group."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _gathered(value: Any) -> list[Any]:
    """The values of all ranks, on each."""
    values = [value] * _ranks()[1]
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values
