"""What a text file holds, and its bytes as UTF-8, lines of JSON or rows.

A file's suffix says, in any case, how it is read: ``.jsonl``/``.ndjson``/``.jsonlines``/``.jl`` line by line,
``.json`` by what it holds (lines, one array of objects, or objects one after the other), ``.parquet``/``.pq`` by rows.
Anything else is one document, unless it holds JSON objects (see `kind_of_text`). ``.gz``, ``.xz``, ``.bz2`` and
``.zst`` after it are decompressed. Byte order marks of UTF-8 and UTF-16 are left out.
"""

from __future__ import annotations

import bz2
import codecs
import functools
import hashlib
import itertools
import json
import lzma
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

SUFFIX = re.compile(r"(?:\.(?P<inner>[a-z0-9]+))?(?:\.(?P<outer>gz|xz|bz2|zst))?$", re.I)
RECORDS = {
    **dict.fromkeys(("jsonl", "ndjson", "jsonlines", "jl"), "lines"),
    **{"json": "values", "parquet": "rows", "pq": "rows"},
}
BOMS = {  # UTF-32's first: its little-endian mark begins like UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
LONGEST_FIRST_OBJECT = 64 << 20  # characters that are read to see what a file holds
BETWEEN = re.compile(r"[ \t\r\n\ufeff]*"), re.compile(r"[ \t\r\n,]*")  # JSON values; the elements of an array
ROWS = 64  # of a Parquet file that are in memory at once
WHERE = {"lines": "{}:{}", "values": "{}: object {}", "rows": "{}: row {}"}


def inner_suffix(name: str) -> str:
    """Suffix without that of a compression, in lower case."""
    match = SUFFIX.search(name)
    return (match["inner"] or "").lower() if match else ""


def kind_of_text(path: str, key: str) -> str:
    """ "lines" where the first two lines are JSON objects, "values" where the first object has ``key`` or the file holds
    JSON objects and nothing else, else "text"."""
    try:
        if not _head(path).startswith((b"{", b"[")):
            return "text"
        if objects_in_lines(path, 2):
            return "lines"
        return "values" if has_key(path, key) or _holds_objects(path) else "text"
    except ValueError:  # damaged: said where it is read
        return "text"


def _head(path: str) -> bytes:
    """The first bytes that are neither white space nor a byte order mark; b"" where 4 KiB hold none."""
    block = next(utf8_blocks(path, 1 << 12), (b"", 0))[0]
    return block.removeprefix(codecs.BOM_UTF8).lstrip()


def objects_in_lines(path: str, count: int) -> bool:
    """Whether the first ``count`` lines that are not blank are whole JSON objects, as in JSON lines."""
    waiting, size, found = list[bytes](), 0, 0
    for block, _ in itertools.chain(utf8_blocks(path, 1 << 16), ((b"\n", 0),)):
        waiting.append(block)
        size += len(block)
        if b"\n" not in block:
            if size > LONGEST_FIRST_OBJECT:
                break
            continue
        *lines, rest = b"".join(waiting).removeprefix(codecs.BOM_UTF8).split(b"\n")
        waiting = [rest]
        for line in filter(bytes.strip, lines):
            try:
                if not line.lstrip().startswith(b"{") or not isinstance(json.loads(line), dict):
                    return False
            except (ValueError, RecursionError):
                return False
            found += 1
            if found == count:
                return True
    return False


def has_key(path: str, key: str) -> bool:
    """Whether the first object of a file of JSON values has ``key``."""
    try:
        for line, _ in value_lines(path, 1 << 16, LONGEST_FIRST_OBJECT):
            first = json.loads(line)
            return isinstance(first, dict) and key in first
    except (ValueError, RecursionError):
        pass
    return False


def _holds_objects(path: str) -> bool:
    """Whether a file is one JSON object, several, or an array of them, whatever their keys."""
    found = False
    try:
        for line, _ in value_lines(path, 1 << 16, LONGEST_FIRST_OBJECT):
            found = isinstance(json.loads(line), dict)
            if not found:
                break
    except (ValueError, RecursionError):
        return False
    return found


def content_digest(path: str) -> bytes:
    found = hashlib.blake2b()
    for block, _ in utf8_blocks(path, 1 << 20):
        found.update(block)
    return found.digest()


def _decompressor(path: str) -> tuple[Callable[[], Any] | None, type[Exception]]:
    end = path.lower().rpartition(".")[2]
    if end == "zst":
        import zstandard

        # Not its stream_reader, which ends silently where a file is cut off.
        return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj, zstandard.ZstdError
    known: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
        "gz": (functools.partial(zlib.decompressobj, 31), zlib.error),
        "xz": (lzma.LZMADecompressor, lzma.LZMAError),
        "bz2": (bz2.BZ2Decompressor, OSError),
    }
    return known.get(end, (None, ValueError))


def _raw_blocks(path: str, size: int) -> Iterator[tuple[bytes, int]]:
    new, damage = _decompressor(path)
    member, members = None, 0
    with open(path, "rb") as file:
        while data := file.read(size):
            cost = len(data)
            while new and data:
                if member is None and members and not (data := data.lstrip(b"\0")):
                    break  # zeros may pad a file after a member
                members += member is None
                member = member or new()
                try:
                    block = member.decompress(data)
                except damage as error:
                    raise ValueError(f"{path}: damaged compressed file: {error}") from None
                yield block, cost
                data, cost, member = (member.unused_data, 0, None) if member.eof else (b"", 0, member)
            if not new:
                yield data, cost
    if member:
        raise ValueError(f"{path}: the compressed file is cut off")


def utf8_blocks(path: str, size: int) -> Iterator[tuple[bytes, int]]:
    """(decompressed UTF-8, bytes read) of a file; ValueError if it is damaged or cut. UTF-16 with its mark is
    transcoded, what it cannot decode becomes bytes that are not UTF-8."""
    blocks = _raw_blocks(path, size)
    head = b""
    cost = 0
    for block, read in blocks:
        head, cost = head + block, cost + read
        if len(head) >= 4:
            break
    encoding = next((name for mark, name in BOMS.items() if head.startswith(mark)), None)
    if encoding is None:
        yield head, cost
        yield from blocks
        return
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    for block, read in itertools.chain(((head, cost),), blocks):
        yield decoder.decode(block).encode("utf-8", "surrogatepass"), read
    if decoder.getstate()[0]:
        yield b"\xff", 0


def value_lines(path: str, size: int, longest: float = math.inf) -> Iterator[tuple[bytes, int]]:
    """(JSON value in a line of its own, bytes read) of a .json: the elements of one array, or values one after the
    other. Raises ValueError, naming the object, where it is not JSON, cut off, or above ``longest`` characters."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # bytes that are not UTF-8 come out as they are
    scan = json.JSONDecoder().raw_decode
    where = WHERE["values"]
    text = ""
    waiting = list[str]()
    wanted = 0
    cost = 0
    number, array, closed = 1, False, False
    for block, read in itertools.chain(utf8_blocks(path, size), ((None, 0),)):
        last = block is None
        waiting.append(decoder.decode(block or b"", final=last))
        cost += read
        if not last and sum(map(len, waiting)) < wanted:
            continue
        text = text + "".join(waiting)
        waiting = []
        wanted = 0
        at = 0
        while True:
            if (at := BETWEEN[array].match(text, at).end()) == len(text):  # type: ignore[union-attr]
                break
            if text[at] == ("]" if array else "[") and (array or (number == 1 and not closed)):
                closed = array
                array = not array
                at += 1
                continue
            try:
                if closed:
                    raise json.JSONDecodeError("text after the end of the array", text, at)
                end = scan(text, at)[1]
            except (json.JSONDecodeError, RecursionError) as error:
                message = getattr(error, "msg", "nested too deep")
                cut = message.startswith("Unterminated string") or getattr(error, "pos", 0) >= len(text) - 16
                if cut and not last and not closed and len(text) - at <= longest:
                    wanted = len(text) - at  # scanning a long value with every block would be quadratic
                    break
                message = f"not valid JSON{', or cut off' if cut else ''}: {message}"
                raise ValueError(f"{where.format(path, number)}: {message}") from None
            if end == len(text) and not last:  # a number may go on
                break
            yield (text[at:end].replace("\n", " ") + "\n").encode("utf-8", "surrogateescape"), cost
            number = number + 1
            at = end
            cost = 0
        text = text[at:]
    if array:
        raise ValueError(f"{where.format(path, number)}: the array has no end: the file is cut off")


def row_lines(path: str, key: str) -> Iterator[tuple[bytes, int]]:
    """(rows of a Parquet file as JSON lines with ``key``, bytes read); without such a column, lines with the others."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20) as file:  # pages, instead of whole row groups
            names = file.schema_arrow.names
            rows = file.metadata.num_rows
            share = os.path.getsize(path) / max(rows, 1)
            if key not in names:
                line = (json.dumps(dict.fromkeys(names)) + "\n").encode()
                for start in range(0, rows, 1024):
                    yield line * min(1024, rows - start), int(share * min(1024, rows - start))
                return
            kind = file.schema_arrow.field(key).type
            if not re.fullmatch(r"(dictionary<values=)?(large_)?(string|binary|null)(_view)?(, .*>)?", str(kind)):
                raise ValueError(f"{path}: the column {key!r} (--text-key) holds {kind}, not text")
            for batch in file.iter_batches(ROWS, columns=[key]):
                column = batch.column(0)
                column = column.dictionary_decode() if hasattr(column, "dictionary_decode") else column
                values = column.cast(pyarrow.large_binary()).to_pylist()
                texts = (v if v is None else v.decode("utf-8", "surrogateescape") for v in values)
                lines = "".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts)
                yield lines.encode("utf-8", "surrogateescape"), int(share * len(column))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file that pyarrow can read: {error}") from None
