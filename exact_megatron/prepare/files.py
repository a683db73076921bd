"""Input files of `exact-megatron prepare`: those named, and those that a folder holds."""

from __future__ import annotations

import errno
import fnmatch
import importlib.util
import os
import re
import stat
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .formats import RECORDS, content_digest, has_key, inner_suffix, kind_of_text, objects_in_lines

GLOBS = "*.txt *.md *.rst *.tex *.py *.pyi *.c *.h *.cc *.cpp *.hpp *.cu *.cuh *.java *.js *.ts *.go *.rs"
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
# What lies beside the files of a published data set and is not of it.
BESIDE_DATA = re.compile(
    r"(readme|licen[cs]e|notice|copying|changelog|contributing|citation|dataset_?card)([._-].*)?$", re.I
)


class File(NamedTuple):
    """``kind``: "text" is one document; "lines", "values" and "rows" hold a document each."""

    name: str
    path: str
    size: int
    mtime_ns: int
    kind: str = "text"


class LeftOut(NamedTuple):
    """``documents`` of ``path``, of which ``first`` is the first ("" for the file itself), and why."""

    path: str
    reason: str
    documents: int = 1
    first: str = ""


def list_files(
    inputs: Sequence[str], globs: Sequence[str] | None = None, key: str = "text"
) -> tuple[list[File], list[LeftOut]]:
    """Input files in the order given, folders sorted by relative path and without their hidden folders.

    Of a folder, files are taken whose name matches ``globs`` in any case. Without ``globs``: what matches GLOBS, also
    compressed, and data files; a .json is one if its first object has ``key``. Beside data files, README and its
    like are left out, and of a file and its compressed copy the copy.

    Returns:
        The files, and what a folder holds beside them, with its reason; what ``globs`` rule out is not named.

    Raises:
        OSError: an input that is missing or cannot be read.
        ValueError: a folder in which no file matches; a package that a file needs is missing.
    """
    found: list[File] = []
    left: list[LeftOut] = []
    for source in inputs:
        stdlib = source == "stdlib"
        root = Path(sysconfig.get_path("stdlib") if stdlib else source)
        if not root.exists():
            what = (
                "is a link to nothing" if root.is_symlink() else "is neither a file, nor a folder, nor the word stdlib"
            )
            raise FileNotFoundError(f"input {source!r} {what}")
        if not root.is_dir():
            found.append(_file(root.name, str(root), key))
            continue
        wanted = ["*.py"] if stdlib else globs
        files, beside = _list_folder(root, "stdlib" if stdlib else root.resolve().name, wanted, stdlib, key)
        if not files:
            reasons = "".join(f"; {item.path}: {item.reason}" for item in beside[:3])
            names = " ".join(wanted or [*GLOBS.split(), *(f"*.{suffix}" for suffix in RECORDS)])
            raise ValueError(f"no file in folder {source!r} matches --glob {names}{reasons}")
        found, left = found + files, left + beside
    return found, left


def needs(package: str, path: str) -> None:
    """Raise ValueError with the pip command if ``package``, which reads ``path``, is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{path}: reading it needs {package}, which is not installed: pip install 'exact-megatron[prepare]'"
        )


def _list_folder(
    root: Path, shown: str, globs: Sequence[str] | None, stdlib: bool, key: str
) -> tuple[list[File], list[LeftOut]]:
    files: list[File] = []
    left: list[LeftOut] = []

    def unreadable(error: OSError) -> None:
        left.append(LeftOut(str(error.filename), f"unreadable ({error.strerror})"))

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        subfolders[:] = [n for n in subfolders if n[0] != "." and not (stdlib and n in NOT_STDLIB)]
        if not stdlib:
            links = [path for path in (os.path.join(folder, n) for n in subfolders) if os.path.islink(path)]
            left += [LeftOut(path, "a link to a folder; name it as an input to read it") for path in links]
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if not _matches(relative, globs):
                if globs is None and name[0] != ".":
                    left.append(LeftOut(str(path), "its suffix is not one of text or data (--glob names others)"))
                continue
            try:
                file = _file(f"{shown}/{relative}", str(path), key)
                if globs is None and inner_suffix(name) == "json" and not has_key(file.path, key):
                    left.append(LeftOut(str(path), f"not JSON with a text under {key!r} (--text-key)"))
                    continue
            except OSError as error:
                reason = error.strerror or str(error).removeprefix(f"{path}: ")
                left.append(LeftOut(str(path), f"unreadable ({reason})"))
                continue
            files.append(file)
    files.sort()
    if globs is None:
        files, beside = _without_beside(files)
        left += beside
    return files, sorted(left)


def _without_beside(files: list[File]) -> tuple[list[File], list[LeftOut]]:
    """Take out README and its like where there are data files, and compressed copies of files that are there too."""
    names = {file.name: file for file in files}
    data = any(file.kind != "text" for file in files)
    kept, left = [], []
    for file in files:
        plain = names.get(re.sub(r"\.(gz|xz|bz2|zst)$", "", file.name, flags=re.I), file)
        if data and file.kind == "text" and BESIDE_DATA.match(os.path.basename(file.name)):
            left.append(LeftOut(file.path, "documentation beside data files; name it as an input to read it"))
        elif plain is not file and content_digest(file.path) == content_digest(plain.path):
            left.append(LeftOut(file.path, f"a compressed copy of {plain.path}"))
        else:
            kept.append(file)
    return kept, left


def _matches(relative: str, globs: Sequence[str] | None) -> bool:
    name = os.path.basename(relative)
    if globs is None:
        return inner_suffix(name) in RECORDS or f"*.{inner_suffix(name)}" in GLOBS.split()
    return any(fnmatch.fnmatchcase((relative if "/" in p else name).lower(), p.lower()) for p in globs)


def _file(name: str, path: str, key: str) -> File:
    """Look at a file; OSError if it is none, or cannot be read, ValueError if a package that it needs is missing."""
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(f"{path}: not a regular file, which can be read more than once")
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    kind = RECORDS.get(inner_suffix(name), "text")
    if kind == "rows":
        needs("pyarrow", path)
        if not name.lower().endswith((".parquet", ".pq")):
            raise OSError(f"{path}: a compressed Parquet file cannot be read in parts: decompress it")
    if path.lower().endswith(".zst"):
        needs("zstandard", path)
    if kind == "values" and objects_in_lines(path, 1):
        kind = "lines"
    if kind == "text":
        kind = kind_of_text(path, key)
    return File(name, path, facts.st_size, facts.st_mtime_ns, kind)


def merge_left_out(items: Iterable[LeftOut]) -> list[LeftOut]:
    """One for each file and reason, in the order of the first."""
    merged: dict[tuple[str, str], LeftOut] = {}
    for item in items:
        before = merged.get(item[:2])
        merged[item[:2]] = item if before is None else before._replace(documents=before.documents + item.documents)
    return list(merged.values())
