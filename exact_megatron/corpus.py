"""Reading text: files, folders and JSONL, cut into shards that are always the same for the same input."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

GLOBS = "*.txt *.md *.rst *.tex *.py *.pyi *.c *.h *.cc *.cpp *.hpp *.cu *.cuh *.java *.js *.ts *.go *.rs"
JSONL = re.compile(r"\.(jsonl|ndjson)(\.gz|\.zst)?$|\.json\.(gz|zst)$")
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class File(NamedTuple):
    name: str
    path: str
    size: int
    mtime_ns: int


class Shard(NamedTuple):
    """Text files, or ``data``: complete lines of the JSONL ``files[0]`` from line ``first_line`` on."""

    number: int
    cost: int  # bytes of input on disk, for the progress display
    files: tuple[File, ...]
    data: bytes | None = None
    first_line: int = 1


def stable_hash(*words: object) -> int:
    """Stable hash of the words, uniform in [0, 2**64)."""
    data = "\0".join(map(str, words)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def list_files(inputs: Sequence[str], globs: Sequence[str]) -> list[File]:
    """Input files in the order given, folders sorted by relative path and without their hidden folders.

    Raises FileNotFoundError for a missing input, ValueError for a folder in which no file matches.
    """
    found: list[File] = []
    for source in inputs:
        stdlib = source == "stdlib"
        root = Path(sysconfig.get_path("stdlib") if stdlib else source)
        if not root.exists():
            raise FileNotFoundError(f"input {source!r} is neither a file, nor a folder, nor the word stdlib")
        patterns, matching = ["*.py"] if stdlib else globs, [(root.name, root)] if root.is_file() else []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [n for n in subfolders if n[0] != "." and not (stdlib and n in NOT_STDLIB)]
            for path in (Path(folder, name) for name in names):
                relative = path.relative_to(root).as_posix()
                if any(fnmatch.fnmatchcase(relative if "/" in p else path.name, p) for p in patterns):
                    matching.append((f"{'stdlib' if stdlib else root.resolve().name}/{relative}", path))
        if not matching:
            raise ValueError(f"no file in folder {source!r} matches --glob {' '.join(patterns)}")
        stats = ((name, path, path.stat()) for name, path in sorted(matching))
        found += [File(name, str(path), stat.st_size, stat.st_mtime_ns) for name, path, stat in stats]
    return found


def _blocks(path: str, size: int) -> Iterator[tuple[bytes, int]]:
    """(decompressed bytes, bytes read) of a plain, .gz or .zst file; ValueError if it is damaged or cut."""
    new: Callable[[], Any] | None = None
    member: Any = None
    damage: type[Exception] = zlib.error
    if path.endswith(".gz"):
        new = functools.partial(zlib.decompressobj, 31)
    elif path.endswith(".zst"):
        import zstandard

        damage = zstandard.ZstdError
        # Not its stream_reader, which ends silently where a file is cut off.
        new = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
    with open(path, "rb") as file:
        while data := file.read(size):
            cost = len(data)
            while new and data:
                member = member or new()
                try:
                    yield member.decompress(data), cost
                except damage as error:
                    raise ValueError(f"{path}: damaged compressed file: {error}") from None
                data, cost, member = member.unused_data, 0, None if member.eof else member
            if not new:
                yield data, cost
    if member:
        raise ValueError(f"{path}: the compressed file is cut off")


def cut_shards(files: Sequence[File], shard_bytes: int) -> Iterator[Shard]:
    """Cut the input into shards, always the same for the same files; holds one JSONL shard at a time."""
    index, group, size = 0, list[File](), 0
    for file in files:
        is_jsonl = JSONL.search(file.name)
        if group and (is_jsonl or size >= shard_bytes):
            yield Shard(index, size, tuple(group))
            index, group, size = index + 1, [], 0
        if not is_jsonl:
            group.append(file)
            size += file.size
            continue
        buffer, line, cost = bytearray(), 1, 0
        for block, read in _blocks(file.path, min(shard_bytes, 1 << 18)):
            buffer += block
            cost += read
            if len(buffer) >= shard_bytes and b"\n" in block:
                end = buffer.rindex(b"\n") + 1
                yield Shard(index, cost, (file,), bytes(buffer[:end]), line)
                index, line, cost = index + 1, line + buffer.count(b"\n", 0, end), 0
                del buffer[:end]
        if buffer:
            yield Shard(index, cost, (file,), bytes(buffer), line)
            index += 1
    if group:
        yield Shard(index, size, tuple(group))


def _decode(data: bytes) -> tuple[str, str]:
    try:
        return data.decode(), ""
    except UnicodeDecodeError:
        return data.decode(errors="replace"), "replaced"


def read_documents(
    shard: Shard, key: str, want: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, str, str]]:
    """(name, text, note) of the documents that ``want(name)``; note is "", "replaced", "empty" or "binary".

    Blank lines are no documents, a binary one has the text "". Raises ValueError, naming file and line, where
    a line is not a JSON object with a string under ``key``.
    """
    if shard.data is None:
        for file in filter(lambda file: want(file.name), shard.files):
            text, note = _decode(Path(file.path).read_bytes())
            note = "binary" if "\0" in text else note if text.strip() else "empty"
            yield file.name, "" if note == "binary" else text, note
        return
    for number, line in enumerate(shard.data.split(b"\n"), shard.first_line):
        if not line.strip() or not want(name := f"{shard.files[0].name}:{number}"):
            continue
        where = f"{shard.files[0].path}:{number}"
        decoded, note = _decode(line)
        try:
            text = json.loads(decoded)[key]
            text.encode()
        except UnicodeEncodeError:  # JSON can spell a lone surrogate, UTF-8 cannot
            text, note = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"), "replaced"
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{where}: no text under the key {key!r} (--text-key): {decoded[:80]}") from None
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from None
        yield name, text, note if text.strip() else "empty"
