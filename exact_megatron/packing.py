"""Document segments of packed samples, from the index alone: no token is read. numpy only.

Megatron (megatron/core/datasets/gpt_dataset.py) lays the documents of an epoch, in the order of `document_index`, end to end
and cuts the stream into samples of S input tokens; with the extra token, sample i also holds token (i + 1) * S as its last
label. A segment is what one sample holds of one document.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NoReturn

import numpy as np

# megatron/core/datasets/indexed_dataset.py: DType
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
SETTLED_SECONDS = 1.0  # after a change of a file; the clocks of file systems tick more often than that
_REMEDY = "copy the .idx and the .bin again, or prepare the data again"


@dataclass(frozen=True)
class TokenIndex:
    """What a .idx file says.

    Attributes:
        prefix: the prefix it came from.
        lengths: int32[sequences], tokens; memory-mapped where the file was checked before.
        dtype: of a token.
        documents: how many there are.
        several: the first document of several sequences, in words; None: each is one or none.
    """

    prefix: str
    lengths: np.ndarray
    dtype: np.dtype
    documents: int
    several: str | None


def read_index(prefix: str, whole_documents: bool = True) -> TokenIndex:
    """Open `prefix`.idx and check all of it against `prefix`.bin, reading no token; once, as long as the two files do not change.

    Args:
        prefix: common prefix of the two files.
        whole_documents: refuse documents of several sequences, see `check_index`.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the .idx is not a Megatron index, has another size than its header says, holds no whole-number tokens, or
            does not describe the .bin, see `check_index`.
    """
    prefix = str(prefix)
    prefix = prefix[:-4] if prefix.endswith((".idx", ".bin")) else prefix
    idx, bin_ = prefix + ".idx", prefix + ".bin"
    for path, other in ((idx, bin_), (bin_, idx)):
        if not os.path.isfile(path):
            beside = f" although {other} is there" if os.path.isfile(other) else ""
            raise FileNotFoundError(
                f"{path} does not exist{beside}: give the common prefix of a Megatron .bin/.idx pair, "
                f"as `exact-megatron prepare --output {prefix}` writes it"
            )
    facts = os.stat(idx), os.stat(bin_)
    key = (idx, *((f.st_dev, f.st_ino, f.st_size, f.st_mtime_ns, f.st_ctime_ns) for f in facts))
    index = _checked.get(key)
    if index is None:
        index = _read(prefix)
        # A file that was written just now may change again without another time.
        if time.time() - max(max(f.st_mtime, f.st_ctime) for f in facts) > SETTLED_SECONDS:
            mapped = np.memmap(idx, dtype=np.int32, mode="r", offset=_HEADER.size, shape=index.lengths.shape)
            _checked[key] = replace(index, lengths=mapped)
    if whole_documents:
        _refuse_several(idx, len(index.lengths), index.documents, index.several)
    return index


_checked: dict[tuple[Any, ...], TokenIndex] = {}


def _read(prefix: str) -> TokenIndex:
    """Read and check `prefix`.idx; the lengths are in memory."""
    idx, bin_ = prefix + ".idx", prefix + ".bin"
    with open(idx, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise ValueError(f"{idx} is not a Megatron index (it starts with {head[:9]!r}): prepare the data again")
    _, version, code, sequences, documents = _HEADER.unpack(head)
    if version != 1 or code not in _DTYPES:
        raise ValueError(
            f"{idx} has version {version} and dtype code {code}; known are version 1 and {sorted(_DTYPES)}; {_REMEDY}"
        )
    dtype = np.dtype(_DTYPES[code])
    if dtype.kind not in "ui":
        raise ValueError(f"{idx} says its tokens are {dtype}; token ids are whole numbers: this is not text data")
    whole = _HEADER.size + sequences * 12 + documents * 8
    if size not in (whole, whole + sequences):  # the latter with a mode for each sequence, as multimodal data have it
        wrong = "is cut short" if size < whole else "has bytes that its header does not account for"
        raise ValueError(
            f"{idx} {wrong}: {size} bytes where {sequences} sequences need {whole}, with {documents} entries in the document "
            f"index; {_REMEDY}"
        )
    if sequences == 0:
        raise ValueError(f"{idx} holds no sequence: there is nothing to train on")

    with open(idx, "rb", buffering=0) as stream:
        tokens = np.empty(sequences, np.int32)
        lengths = _Entries(stream.fileno(), _HEADER.size, sequences, tokens)
        pointers = _Entries(stream.fileno(), _HEADER.size + sequences * 4, sequences)
        index = _Entries(stream.fileno(), _HEADER.size + sequences * 12, documents)
        several = check_index(prefix, lengths, pointers, index, dtype, os.path.getsize(bin_), whole_documents=False)
    return TokenIndex(prefix, tokens, dtype, documents - 1, several)


@dataclass(frozen=True)
class _Entries:
    """An array in a file, read part by part: a memory map would fault page by page, stay resident, and not be aligned.

    Where `kept` is given, the parts stay there.
    """

    file: int
    offset: int
    count: int
    kept: np.ndarray | None = None

    def __len__(self) -> int:
        return self.count


def _load(source: np.ndarray | _Entries, first: int, stop: int, buffer: np.ndarray) -> np.ndarray:
    """source[first:stop], in `buffer` or where it is kept."""
    part = buffer[: stop - first]
    if isinstance(source, np.ndarray):
        part[:] = source[first:stop]
        return part
    if source.kept is not None:
        part = source.kept[first:stop]
    if os.preadv(source.file, [part.data.cast("B")], source.offset + first * part.itemsize) != part.nbytes:
        raise OSError("the .idx became shorter while it was read")
    return part


def check_index(
    prefix: str,
    lengths: np.ndarray | _Entries,
    pointers: np.ndarray | _Entries,
    documents: np.ndarray | _Entries,
    dtype: np.dtype,
    size: int | None,
    whole_documents: bool = True,
    chunk: int = 1 << 17,
) -> str | None:
    """Check in one pass that the three arrays of a .idx describe a .bin.

    What megatron/core/datasets/indexed_dataset.py (IndexedDatasetBuilder) can write is accepted: sequences of no token, and
    documents of no sequence, which stand as equal neighbours in the document index (tools/preprocess_data.py writes one for an
    empty text).

    Args:
        prefix: of the files, for messages.
        lengths: int32[sequences], tokens.
        pointers: int64[sequences], bytes into the .bin where each sequence starts.
        documents: int64[documents + 1], the sequence each document starts with, then the number of sequences.
        dtype: of a token.
        size: bytes of the .bin; None where that is not known (object storage).
        whole_documents: refuse documents of several sequences (text split into sentences): Megatron packs sequences and shuffles
            them, so that effective contexts and masks would end inside documents.
        chunk: entries that a thread holds at once.

    Returns:
        The first document of several sequences, in words; None where there is none.

    Raises:
        ValueError: a length below 0, a pointer that is not the running sum of the lengths, a .bin of another size, a document
            index that does not rise from 0 to the number of sequences, or several sequences a document; the first wrong entry is
            named, with the values found and expected.
    """
    idx = prefix + ".idx"
    count = len(lengths)
    threads = min(4, len(os.sched_getaffinity(0)))  # numpy and reading run at once

    def parts(entries: int) -> list[tuple[int, int]]:
        step = chunk * max(1, -(-entries // (chunk * threads)))
        return [(first, min(first + step, entries)) for first in range(0, entries, step)]

    with ThreadPoolExecutor(threads) as pool:
        sequence_parts = [
            pool.submit(_scan_sequences, lengths, pointers, dtype.itemsize, *part, chunk) for part in parts(count)
        ]
        document_parts = [pool.submit(_scan_documents, documents, *part, chunk) for part in parts(len(documents))]
    for scanned in sequence_parts:
        if (wrong := scanned.result()) is not None:
            _refuse_sequences(idx, lengths, pointers, dtype, wrong, chunk)
    total = 0
    if count:
        begin = _load(pointers, count - 1, count, np.empty(1, np.int64))
        total = int(begin[0]) + dtype.itemsize * int(_load(lengths, count - 1, count, np.empty(1, np.int32))[0])
    if size is not None and size != total:
        raise ValueError(
            f"{prefix}.bin has {size} bytes where {idx} describes {total} ({count} sequences, {dtype} tokens): one of the "
            f"two is truncated or belongs to other data; {_REMEDY}"
        )
    if total == 0:
        raise ValueError(f"{idx} holds {count} sequences and no token: there is nothing to train on")
    if len(documents) < 2:
        raise ValueError(
            f"{idx} is damaged: its document index has {len(documents)} entries, expected 0, ..., {count}; {_REMEDY}"
        )
    found = [scanned.result() for scanned in document_parts]
    wrong = next((wrong for wrong, _ in found if wrong is not None), None)
    last = len(documents) - 1
    ends = [int(_load(documents, at, at + 1, np.empty(1, np.int64))[0]) for at in (0, last)]
    if ends[0] != 0:
        _refuse(idx, "document index", 0, ends[0], "0")
    if wrong is not None:
        before, after = _load(documents, wrong - 1, wrong + 1, np.empty(2, np.int64)).tolist()
        _refuse(idx, "document index", wrong, after, f"{before} or more, as the entry before it")
    if ends[1] != count:
        _refuse(idx, "document index", last, ends[1], f"{count}, the number of sequences")
    several = next((several for _, several in found if several is not None), None)
    if whole_documents:
        _refuse_several(idx, count, last, several)
    return several


def _refuse_several(idx: str, sequences: int, documents: int, several: str | None) -> None:
    if several is not None:
        raise ValueError(
            f"{idx} holds {sequences} sequences in {documents} documents ({several}): Megatron packs and shuffles sequences, "
            "so that effective contexts and document masks would end inside documents. Prepare the data with one sequence a document, "
            "as `exact-megatron prepare` and Megatron-LM's preprocess_data.py without --split-sentences write them, or train without "
            "EXACT and without document masking"
        )


def _scan_sequences(
    lengths: np.ndarray | _Entries, pointers: np.ndarray | _Entries, itemsize: int, start: int, stop: int, chunk: int
) -> int | None:
    """Where the first chunk of the entries start..stop begins that has a wrong length or pointer.

    Each pointer is compared with the one before it, the first one with 0; a difference that overflows is right modulo 2^64, as its
    sum is.
    """
    count = len(lengths)
    tokens_buffer = np.empty(chunk, np.int32)
    begin_buffer = np.empty(chunk + 1, np.int64)
    bytes_buffer = np.empty(chunk, np.int64)
    step_buffer = np.empty(chunk, np.int64)
    equal_buffer = np.empty(chunk, bool)
    for first in range(start, stop, chunk):
        end = min(first + chunk, stop)
        tokens = _load(lengths, first, end, tokens_buffer)
        begin = _load(pointers, first, min(end + 1, count), begin_buffer)
        steps = len(begin) - 1
        expected = bytes_buffer[:steps]
        np.copyto(expected, tokens[:steps])
        np.multiply(expected, itemsize, out=expected)
        step = np.subtract(begin[1:], begin[:-1], out=step_buffer[:steps])
        same = np.equal(step, expected, out=equal_buffer[:steps])
        if (first == 0 and begin[0] != 0) or tokens.min() < 0 or not same.all():
            return first
    return None


def _refuse_sequences(
    idx: str, lengths: np.ndarray | _Entries, pointers: np.ndarray | _Entries, dtype: np.dtype, first: int, chunk: int
) -> NoReturn:
    """Name the first wrong entry from `first` on; those before it are right."""
    end = min(first + chunk + 1, len(lengths))
    tokens = _load(lengths, first, end, np.empty(end - first, np.int32))
    begin = _load(pointers, first, end, np.empty(end - first, np.int64))
    expected = begin[:-1] + tokens[:-1].astype(np.int64) * dtype.itemsize
    expected = np.concatenate([begin[:1] if first else [0], expected])
    at = int(np.argmax((tokens < 0) | (begin != expected)))
    if begin[at] != expected[at]:
        where = f"{expected[at]}, the bytes of the {dtype} tokens before it"
        _refuse(idx, "sequence pointers", first + at, begin[at], where)
    _refuse(idx, "sequence lengths", first + at, tokens[at], "0 or more")


def _scan_documents(
    documents: np.ndarray | _Entries, start: int, stop: int, chunk: int
) -> tuple[int | None, str | None]:
    """Of the entries start..stop and the one after them: the first that is below the one before it, and the first document of
    several sequences, in words."""
    several = None
    begin_buffer = np.empty(chunk + 1, np.int64)
    rises_buffer = np.empty(chunk, bool)
    for first in range(start, stop, chunk):
        end = min(first + chunk + 1, stop + 1, len(documents))
        begin = _load(documents, first, end, begin_buffer)
        rises = np.greater(begin[1:], begin[:-1], out=rises_buffer[: len(begin) - 1])
        # Numbers that rise by as much as there are steps rise by one each.
        if rises.all() and int(begin[-1]) - int(begin[0]) == len(rises):
            continue
        falls = begin[1:] < begin[:-1]
        if falls.any():
            return first + 1 + int(np.argmax(falls)), several
        step = np.diff(begin)
        if several is None and step.max() > 1:
            at = int(np.argmax(step > 1))
            several = f"document {first + at} is sequences {begin[at]} to {begin[at + 1] - 1}"
    return None, several


def _refuse(idx: str, array: str, entry: int, found: int, expected: str) -> NoReturn:
    raise ValueError(
        f"{idx} is damaged: entry {entry} of its {array}, counted from 0, is {found}, expected {expected}; {_REMEDY}"
    )


def sample_segments(
    document_index: np.ndarray,
    sample_index: np.ndarray,
    lengths: np.ndarray,
    sample: int,
    seq_length: int,
    extra_token: int = 1,
) -> tuple[np.ndarray, bool]:
    """Boundaries of the segments in one packed sample.

    Args:
        document_index: int32[epochs * documents], documents in packed order.
        sample_index: int[samples + 1, 2], (position in document_index, token offset) where each sample starts.
        lengths: int32[documents], tokens per document.
        sample: the sample, after the shuffle index.
        seq_length: input tokens S.
        extra_token: 1 when the sample holds one more token for the last label, else 0.

    Returns:
        (cu_seqlens int64[segments + 1] from 0 to S, continues): `continues` says that the last label belongs to the last segment. A
        sample shorter than S (the last one of a validation split) is padded: its inputs reach to the stream's last token, and
        the padding is folded into the last segment, its targets masked.
    """
    (first, offset), (last, end) = sample_index[sample : sample + 2].tolist()
    sizes = lengths[document_index[first : last + 1]].tolist()
    sizes[-1] = end  # of the last document, up to where the next sample starts
    sizes[0] -= offset
    if extra_token and sum(sizes) < seq_length:
        sizes[-1] += 1  # the stream's last token is an input here
    # Without empty documents, and without the document of which a sample only has the label token.
    cu = [0, *accumulate(size for size in sizes if size > 0)]
    continues = bool(extra_token) and sizes[-1] > 0 and cu[-1] == seq_length
    cu[-1] = seq_length
    return np.array(cu, np.int64), continues


def misplaced_sample(
    document_index: np.ndarray, sample_index: np.ndarray, lengths: np.ndarray, seq_length: int, chunk: int = 1 << 19
) -> int | None:
    """First sample that does not start at i * S in the stream of these documents, None if all do.

    Megatron's index caches are named by the data's path: data prepared again at the same place meet the old indices.

    Args:
        document_index, sample_index, lengths, seq_length: as for `sample_segments`.
        chunk: documents held at once.
    """
    if int(document_index.max(initial=0)) >= len(lengths):
        return 0
    lengths = aligned(lengths)
    offset = 0
    for first in range(0, len(document_index), chunk):
        size = lengths.take(document_index[first : first + chunk]).astype(np.int64)
        begin = np.cumsum(size) - size + offset
        low, high = np.searchsorted(sample_index[:, 0], [first, first + len(size)])
        document = sample_index[low:high, 0].astype(np.int64) - first
        inside = sample_index[low:high, 1]
        wrong = (begin[document] + inside != np.arange(low, high) * seq_length) | (inside > size[document])
        if wrong.any():
            return int(low + np.argmax(wrong))
        offset += int(size.sum())
    return None


def reaching_samples(
    document_index: np.ndarray,
    sample_index: np.ndarray,
    lengths: np.ndarray,
    least: int,
    extra_token: int = 1,
    chunk: int = 1 << 16,
) -> np.ndarray:
    """Which samples hold a target with an effective context of `least` or more.

    Args:
        document_index, sample_index, lengths, extra_token: as for `sample_segments`.
        least: tokens, 1..S - 1.
        chunk: samples held at once.

    Returns:
        bool[samples], in packed order.
    """
    reach = np.zeros(len(sample_index) - 1, bool)
    lengths = aligned(lengths)
    for start in range(0, len(reach), chunk):
        index = np.array(sample_index[start : start + chunk + 1], np.int64)
        first, last, end = index[:-1, 0], index[1:, 0], index[1:, 1]
        low = int(first[0])
        size = lengths.take(document_index[low : int(last[-1]) + 1])
        # A segment of length L reaches L - 1, and L if its document goes on.
        found = np.where(first == last, True, (size[first - low] - index[:-1, 1] > least) | (end + extra_token > least))
        whole = low + np.flatnonzero(size > least)  # documents, of which those matter that lie inside a sample
        sample = np.searchsorted(first, whole) - 1
        found[sample[(sample >= 0) & (last[sample] > whole)]] = True
        reach[start : start + chunk] = found
    return reach


@dataclass
class SegmentHistogram:
    """Segments by length, over a set of samples.

    Attributes:
        ended: int64[S + 1], segments whose last target is the next document's first token.
        continued: int64[S + 1], segments whose document goes on in the next sample.
        closing: samples that end together with a document, which is counted in `ended`.
    """

    ended: np.ndarray
    continued: np.ndarray
    closing: int


def aligned(lengths: np.ndarray) -> np.ndarray:
    """Lengths to `take` from: mapped from a .idx they are not aligned, and each `take` would copy all of them."""
    return np.require(lengths, requirements="A")


def _chunks(lengths: np.ndarray, document_index: np.ndarray | None, chunk: int) -> Iterator[np.ndarray]:
    """Yield document lengths in packed order, at most `chunk` at a time."""
    lengths = lengths if document_index is None else aligned(lengths)
    total = len(lengths) if document_index is None else len(document_index)
    for start in range(0, total, chunk):
        part = slice(start, start + chunk)
        yield lengths[part] if document_index is None else lengths.take(document_index[part])


def stream_tokens(lengths: np.ndarray, document_index: np.ndarray | None = None, chunk: int = 1 << 19) -> int:
    """Tokens of the packed stream."""
    return sum(int(part.sum(dtype=np.int64)) for part in _chunks(lengths, document_index, chunk))


def segment_histogram(
    lengths: np.ndarray,
    seq_length: int,
    *,
    samples: int,
    document_index: np.ndarray | None = None,
    chosen: np.ndarray | None = None,
    chunk: int = 1 << 19,
) -> SegmentHistogram:
    """Histogram the segments of the first `samples` samples in one pass over the documents.

    Args:
        lengths: int[documents], tokens per document, EOD included.
        seq_length: input tokens per sample S.
        samples: samples of the stream, in packed order; the stream must reach to their end.
        document_index: int[n], documents in packed order; None is the stored order.
        chosen: bool[samples], count only these samples (a blend draws only some of a member's); None counts all.
        chunk: documents held at once.
    """
    s = seq_length
    ended = np.zeros(s + 1, np.int64)
    continued = np.zeros(s + 1, np.int64)
    closing = 0
    stream_end = samples * s
    offset = 0  # stream position of the chunk's first token
    for part in _chunks(lengths, document_index, chunk):
        size = part.astype(np.int64)  # a copy: documents that are cut or left out are set to 0 below
        end = np.cumsum(size)
        end += offset
        # Sample ends that lie in this chunk, and the document that holds the token before each.
        boundary = np.arange(offset // s + 1, min(int(end[-1]), stream_end) // s + 1) * s
        document = np.searchsorted(end, boundary)
        cut = end[document] > boundary
        closed = boundary[~cut] // s - 1  # samples that end together with a document
        document = document[cut]
        boundary = boundary[cut]
        head = np.minimum(boundary - (end[document] - size[document]), s)
        rest = end[document] - boundary
        final = (rest <= s) & (boundary < stream_end)  # the document's last segment follows this boundary
        rest = rest[final]
        sample = boundary // s
        size[document] = 0
        if int(end[-1]) > stream_end:  # the documents behind the last sample; one across its end was cut
            size[end > stream_end] = 0
        if chosen is not None:
            closed = closed[chosen[closed]]
            head = head[chosen[sample - 1]]
            rest = rest[chosen[sample[final]]]
            inside = size > 0
            size = size[inside][chosen[(end[inside] - 1) // s]]
        ended += np.bincount(size, minlength=s + 1) + np.bincount(rest, minlength=s + 1)
        continued += np.bincount(head, minlength=s + 1)
        closing += len(closed)
        offset = int(end[-1])
        if offset >= stream_end:
            break
    ended[0] = 0  # empty documents have no segment
    return SegmentHistogram(ended, continued, closing)
