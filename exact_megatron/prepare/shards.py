"""Documents of the input, cut into shards that are always the same for the same input."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from .files import File, LeftOut
from .formats import WHERE, row_lines, utf8_blocks, value_lines

PACKED = {  # first bytes of files that need their suffix to be read
    b"\x1f\x8b": ".gz",
    b"\xfd7zXZ\0": ".xz",
    b"BZh": ".bz2",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PAR1": ".parquet",
}
NUL = "binary (it holds NUL bytes)"


class Shard(NamedTuple):
    """Text files, or ``data``: records of ``files[0]``, a JSON object a line, from record ``first_record`` on."""

    cost: int  # bytes of input on disk, for the progress display
    files: tuple[File, ...]
    data: bytes | None = None
    first_record: int = 1

    def digest(self, *words: object) -> str:
        """Changes with ``words``, with the files (name, path, size, time) or with the records and their place."""
        files = [(file.name, os.path.abspath(file.path), file.size, file.mtime_ns) for file in self.files]
        facts: list[Any] = files if self.data is None else [self.files[0].name, self.first_record]
        found = hashlib.blake2b(json.dumps([words, facts]).encode(), digest_size=16)
        found.update(self.data or b"")
        return found.hexdigest()


def stable_hash(*words: object) -> int:
    """Stable hash of the words, uniform in [0, 2**64)."""
    data = "\0".join(map(str, words)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def cut_shards(files: Sequence[File], shard_bytes: int, key: str = "text") -> Iterator[Shard]:
    """Cut the input into shards, always the same for the same files; holds one shard of records at a time.

    Where text files are cut depends on the file before the cut, so that another file's change leaves most cuts where
    they are.
    """
    group = list[File]()
    size = 0
    for file in files:
        if group and file.kind != "text":
            yield Shard(size, tuple(group))
            group = []
            size = 0
        if file.kind != "text":
            yield from _cut_records(file, shard_bytes, key)
            continue
        group.append(file)
        size += file.size
        if size >= shard_bytes or stable_hash("cut", file.name) * shard_bytes < 2**65 * file.size:
            yield Shard(size, tuple(group))
            group = []
            size = 0
    if group:
        yield Shard(size, tuple(group))


def _cut_records(file: File, shard_bytes: int, key: str) -> Iterator[Shard]:
    size = min(shard_bytes, 1 << 18)
    if file.kind == "rows":
        blocks = row_lines(file.path, key)
    else:
        blocks = (value_lines if file.kind == "values" else utf8_blocks)(file.path, size)
    buffer = bytearray()
    record = 1
    cost = 0
    for block, read in blocks:
        buffer += block
        cost += read
        if len(buffer) >= shard_bytes and b"\n" in block:
            end = buffer.rindex(b"\n") + 1
            yield Shard(cost, (file,), bytes(buffer[:end]), record)
            record = record + buffer.count(b"\n", 0, end)
            cost = 0
            del buffer[:end]
    if buffer or record == 1:  # a file without records is named, too
        yield Shard(cost, (file,), bytes(buffer), record)


def _decode(data: bytes) -> tuple[str, str]:
    try:
        return data.decode(), ""
    except UnicodeDecodeError:
        return data.decode(errors="replace"), "replaced"


def _record(line: str, key: str) -> tuple[Any, bool]:
    """The JSON value, and whether it is an object that gives ``key`` twice."""
    twice = False

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal twice
        found = dict(pairs)
        twice = (
            len(found) < len(pairs) and [name for name, _ in pairs].count(key) > 1
        )  # the outermost object comes last
        return found

    value = json.loads(line, object_pairs_hook=as_dict)
    return value, twice


def read_documents(
    shard: Shard, key: str, want: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, str, str, LeftOut | None]]:
    """(name, text, note, left out) of the documents that ``want(name)``, without a byte order mark.

    The note is "", "replaced" (undecodable bytes became U+FFFD), or, with the text "" and why it is left out, "empty" or
    "binary". Blank lines are no documents. Raises ValueError, naming file and place, where a record is not a JSON
    object, or holds something else than text under ``key``; no text, or null, is empty.
    """
    if shard.data is None:
        for file in filter(lambda file: want(file.name), shard.files):
            data = b"".join(block for block, _ in utf8_blocks(file.path, 1 << 20))
            content, note = _decode(data)
            content = content.removeprefix("\ufeff")
            if (note or "\0" in content) and (
                suffix := next((end for mark, end in PACKED.items() if data.startswith(mark)), None)
            ):
                yield file.name, "", "binary", LeftOut(file.path, f"binary (its content is {suffix}: rename it so)")
            elif "\0" in content:
                yield file.name, "", "binary", LeftOut(file.path, NUL)
            elif not content.strip():
                yield file.name, "", "empty", LeftOut(file.path, "empty")
            else:
                yield file.name, content, note, None
        return
    source = shard.files[0]
    if shard.first_record == 1 and not shard.data.strip() and want(source.name):
        yield source.name, "", "empty", LeftOut(source.path, "it holds no record")
    for number, line in enumerate(shard.data.split(b"\n"), shard.first_record):
        line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip() or not want(name := f"{source.name}:{number}"):
            continue
        where = WHERE[source.kind].format(source.path, number)
        decoded, note = _decode(line)
        try:
            record, twice = _record(decoded, key)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: not a JSON object with a text under {key!r}: {decoded[:80]}")
        if twice:
            raise ValueError(f"{where}: {key!r} (--text-key) is given twice in one object")
        text = record.get(key)
        if text is None:
            reason = f"null under {key!r}" if key in record else f"no {key!r} (--text-key)"
            where += "" if key in record else f", which has {', '.join(map(repr, record))[:80] or 'no key'}"
            yield name, "", "empty", LeftOut(source.path, reason, 1, where)
            continue
        if not isinstance(text, str):
            raise ValueError(f"{where}: {key!r} (--text-key) holds {json.dumps(text)[:80]}, which is not text")
        text = text.removeprefix("\ufeff")
        if "\0" in text:
            yield name, "", "binary", LeftOut(source.path, NUL, 1, where)
            continue
        if not text.strip():
            yield name, "", "empty", LeftOut(source.path, "empty", 1, where)
            continue
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can spell a lone surrogate, UTF-8 cannot
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            note = "replaced"
        yield name, text, note, None
