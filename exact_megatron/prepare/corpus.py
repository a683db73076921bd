"""Reading text: files, folders, JSON and Parquet, cut into shards that are always the same for the same input.

A file's suffix says, in any case, how it is read: ``.jsonl``/``.ndjson``/``.jsonlines``/``.jl`` line by line,
``.json`` by what it holds (lines, one array of objects, or objects one after the other), ``.parquet``/``.pq`` by rows.
Anything else is one document, unless it holds JSON objects (see `_kind_of_text`). ``.gz``, ``.xz``, ``.bz2`` and
``.zst`` after it are decompressed. Byte order marks of UTF-8 and UTF-16 are left out.
"""

from __future__ import annotations

import bz2
import codecs
import errno
import fnmatch
import functools
import hashlib
import importlib.util
import itertools
import json
import lzma
import math
import os
import re
import stat
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

GLOBS = "*.txt *.md *.rst *.tex *.py *.pyi *.c *.h *.cc *.cpp *.hpp *.cu *.cuh *.java *.js *.ts *.go *.rs"
SUFFIX = re.compile(r"(?:\.(?P<inner>[a-z0-9]+))?(?:\.(?P<outer>gz|xz|bz2|zst))?$", re.I)
RECORDS = {
    **dict.fromkeys(("jsonl", "ndjson", "jsonlines", "jl"), "lines"),
    **{"json": "values", "parquet": "rows", "pq": "rows"},
}
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
# What lies beside the files of a published data set and is not of it.
BESIDE_DATA = re.compile(
    r"(readme|licen[cs]e|notice|copying|changelog|contributing|citation|dataset_?card)([._-].*)?$", re.I
)
BOMS = {  # UTF-32's first: its little-endian mark begins like UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
PACKED = {  # first bytes of files that need their suffix to be read
    b"\x1f\x8b": ".gz",
    b"\xfd7zXZ\0": ".xz",
    b"BZh": ".bz2",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PAR1": ".parquet",
}
LONGEST_FIRST_OBJECT = 64 << 20  # characters that are read to see what a file holds
BETWEEN = re.compile(r"[ \t\r\n\ufeff]*"), re.compile(r"[ \t\r\n,]*")  # JSON values; the elements of an array
ROWS = 64  # of a Parquet file that are in memory at once
NUL = "binary (it holds NUL bytes)"
WHERE = {"lines": "{}:{}", "values": "{}: object {}", "rows": "{}: row {}"}


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
                if globs is None and _inner(name) == "json" and not _has_key(file.path, key):
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
        elif plain is not file and _content(file.path) == _content(plain.path):
            left.append(LeftOut(file.path, f"a compressed copy of {plain.path}"))
        else:
            kept.append(file)
    return kept, left


def _inner(name: str) -> str:
    """Suffix without that of a compression, in lower case."""
    match = SUFFIX.search(name)
    return (match["inner"] or "").lower() if match else ""


def _matches(relative: str, globs: Sequence[str] | None) -> bool:
    name = os.path.basename(relative)
    if globs is None:
        return _inner(name) in RECORDS or f"*.{_inner(name)}" in GLOBS.split()
    return any(fnmatch.fnmatchcase((relative if "/" in p else name).lower(), p.lower()) for p in globs)


def _file(name: str, path: str, key: str) -> File:
    """Look at a file; OSError if it is none, or cannot be read, ValueError if a package that it needs is missing."""
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(f"{path}: not a regular file, which can be read more than once")
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    kind = RECORDS.get(_inner(name), "text")
    if kind == "rows":
        needs("pyarrow", path)
        if not name.lower().endswith((".parquet", ".pq")):
            raise OSError(f"{path}: a compressed Parquet file cannot be read in parts: decompress it")
    if path.lower().endswith(".zst"):
        needs("zstandard", path)
    if kind == "values" and _objects_in_lines(path, 1):
        kind = "lines"
    if kind == "text":
        kind = _kind_of_text(path, key)
    return File(name, path, facts.st_size, facts.st_mtime_ns, kind)


def _kind_of_text(path: str, key: str) -> str:
    """ "lines" where the first two lines are JSON objects, "values" where the first object has ``key`` or the file holds
    JSON objects and nothing else, else "text"."""
    try:
        if not _head(path).startswith((b"{", b"[")):
            return "text"
        if _objects_in_lines(path, 2):
            return "lines"
        return "values" if _has_key(path, key) or _holds_objects(path) else "text"
    except ValueError:  # damaged: said where it is read
        return "text"


def _head(path: str) -> bytes:
    """The first bytes that are neither white space nor a byte order mark; b"" where 4 KiB hold none."""
    block = next(_blocks(path, 1 << 12), (b"", 0))[0]
    return block.removeprefix(codecs.BOM_UTF8).lstrip()


def _objects_in_lines(path: str, count: int) -> bool:
    """Whether the first ``count`` lines that are not blank are whole JSON objects, as in JSON lines."""
    waiting, size, found = list[bytes](), 0, 0
    for block, _ in itertools.chain(_blocks(path, 1 << 16), ((b"\n", 0),)):
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


def _has_key(path: str, key: str) -> bool:
    """Whether the first object of a file of JSON values has ``key``."""
    try:
        for line, _ in _value_lines(path, 1 << 16, LONGEST_FIRST_OBJECT):
            first = json.loads(line)
            return isinstance(first, dict) and key in first
    except (ValueError, RecursionError):
        pass
    return False


def _holds_objects(path: str) -> bool:
    """Whether a file is one JSON object, several, or an array of them, whatever their keys."""
    found = False
    try:
        for line, _ in _value_lines(path, 1 << 16, LONGEST_FIRST_OBJECT):
            found = isinstance(json.loads(line), dict)
            if not found:
                break
    except (ValueError, RecursionError):
        return False
    return found


def _content(path: str) -> bytes:
    found = hashlib.blake2b()
    for block, _ in _blocks(path, 1 << 20):
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


def _blocks(path: str, size: int) -> Iterator[tuple[bytes, int]]:
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
        blocks = _row_lines(file.path, key)
    else:
        blocks = (_value_lines if file.kind == "values" else _blocks)(file.path, size)
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


def _value_lines(path: str, size: int, longest: float = math.inf) -> Iterator[tuple[bytes, int]]:
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
    for block, read in itertools.chain(_blocks(path, size), ((None, 0),)):
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


def _row_lines(path: str, key: str) -> Iterator[tuple[bytes, int]]:
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
            data = b"".join(block for block, _ in _blocks(file.path, 1 << 20))
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


def merge_left_out(items: Iterable[LeftOut]) -> list[LeftOut]:
    """One for each file and reason, in the order of the first."""
    merged: dict[tuple[str, str], LeftOut] = {}
    for item in items:
        before = merged.get(item[:2])
        merged[item[:2]] = item if before is None else before._replace(documents=before.documents + item.documents)
    return list(merged.values())
