"""Document pieces of packed samples, from the index alone: no token is read. numpy only.

Megatron (megatron/core/datasets/gpt_dataset.py) lays the documents of an epoch, in the order of `document_index`, end to end
and cuts the stream into samples of S input tokens; with the extra token, sample i also holds token (i + 1) * S as its last
label. A piece is what one sample holds of one document.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import NoReturn

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
_REMEDY = "copy the .idx and the .bin again, or prepare the data again"


@dataclass(frozen=True)
class TokenIndex:
    """What a .idx file says: lengths int32[sequences] in tokens (memory-mapped), the token dtype, the prefix it came from."""

    prefix: str
    lengths: np.ndarray
    dtype: np.dtype


def read_index(prefix: str, whole_documents: bool = True) -> TokenIndex:
    """Open `prefix`.idx and check all of it against `prefix`.bin, reading no token.

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
    size = os.path.getsize(idx)
    with open(idx, "rb") as stream:
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

    bin_size = os.path.getsize(bin_)
    with open(idx, "rb", buffering=0) as stream:
        lengths = _Entries(stream.fileno(), np.int32, _HEADER.size, sequences)
        pointers = _Entries(stream.fileno(), np.int64, _HEADER.size + sequences * 4, sequences)
        index = _Entries(stream.fileno(), np.int64, _HEADER.size + sequences * 12, documents)
        check_index(prefix, lengths, pointers, index, dtype, bin_size, whole_documents)
    mapped = np.memmap(idx, dtype=np.int32, mode="r", offset=_HEADER.size, shape=(sequences,))
    return TokenIndex(prefix, mapped, dtype)


class _Entries:
    """An array in a file, read slice by slice into one buffer: a memory map would fault page by page and stay resident.

    A slice is valid until the next one is taken.
    """

    def __init__(self, file: int, kind: type, offset: int, count: int) -> None:
        self._file, self._offset, self._count = file, offset, count
        self._buffer: np.ndarray = np.empty(0, kind)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self._count)
        if len(self._buffer) < stop - start:
            self._buffer = np.empty(stop - start, self._buffer.dtype)
        found = self._buffer[: stop - start]
        if os.preadv(self._file, [found.data.cast("B")], self._offset + start * found.itemsize) != found.nbytes:
            raise OSError("the .idx became shorter while it was read")
        return found


def check_index(
    prefix: str,
    lengths: np.ndarray | _Entries,
    pointers: np.ndarray | _Entries,
    documents: np.ndarray | _Entries,
    dtype: np.dtype,
    size: int | None,
    whole_documents: bool = True,
    chunk: int = 1 << 15,
) -> None:
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
        chunk: entries held at once.

    Raises:
        ValueError: a length below 0, a pointer that is not the running sum of the lengths, a .bin of another size, a document
            index that does not rise from 0 to the number of sequences, or several sequences a document; the first wrong entry is
            named, with the values found and expected.
    """
    idx = prefix + ".idx"
    with ThreadPoolExecutor(1) as pool:  # most of the time is that of copying memory, in which threads run at once
        later = pool.submit(_check_documents, idx, documents, len(lengths), chunk)
        total = _check_sequences(idx, lengths, pointers, dtype, chunk)
        if size is not None and size != total:
            raise ValueError(
                f"{prefix}.bin has {size} bytes where {idx} describes {total} ({len(lengths)} sequences, {dtype} tokens): one of the "
                f"two is truncated or belongs to other data; {_REMEDY}"
            )
        if total == 0:
            raise ValueError(f"{idx} holds {len(lengths)} sequences and no token: there is nothing to train on")
        several = later.result()
    if whole_documents and several is not None:
        raise ValueError(
            f"{idx} holds {len(lengths)} sequences in {len(documents) - 1} documents ({several}): Megatron packs and shuffles sequences, "
            "so that effective contexts and document masks would end inside documents. Prepare the data with one sequence a document, "
            "as `exact-megatron prepare` and Megatron-LM's preprocess_data.py without --split-sentences write them, or train without "
            "EXACT and without document masking"
        )


def _check_sequences(
    idx: str, lengths: np.ndarray | _Entries, pointers: np.ndarray | _Entries, dtype: np.dtype, chunk: int
) -> int:
    """Bytes of all sequences."""
    total = 0
    for first in range(0, len(lengths), chunk):
        tokens = lengths[first : first + chunk]
        begin = pointers[first : first + chunk]
        end = np.multiply(tokens, dtype.itemsize, dtype=np.int64)
        end += begin
        if begin[0] != total or tokens.min() < 0 or not np.array_equal(end[:-1], begin[1:]):
            expected = np.append(total, end[:-1])
            at = int(np.argmax((tokens < 0) | (begin != expected)))
            if begin[at] != expected[at]:
                where = f"{expected[at]}, the bytes of the {dtype} tokens before it"
                _refuse(idx, "sequence pointers", first + at, begin[at], where)
            _refuse(idx, "sequence lengths", first + at, tokens[at], "0 or more")
        total = int(end[-1])
    return total


def _check_documents(idx: str, documents: np.ndarray | _Entries, count: int, chunk: int) -> str | None:
    """The first document of several of the `count` sequences, in words."""
    last = len(documents) - 1
    if last < 1:
        raise ValueError(
            f"{idx} is damaged: its document index has {last + 1} entries, expected 0, ..., {count}; {_REMEDY}"
        )
    several, before = None, 0
    for first in range(0, last + 1, chunk):
        begin = documents[first : first + chunk]
        if first == 0 and begin[0] != 0:
            _refuse(idx, "document index", 0, begin[0], "0")
        if begin[0] != before + (first > 0) or not (begin[1:] - begin[:-1] == 1).all():
            step = np.diff(begin, prepend=before)
            if step.min() < 0:
                at = int(np.argmax(step < 0))
                expected = f"{begin[at] - step[at]} or more, as the entry before it"
                _refuse(idx, "document index", first + at, begin[at], expected)
            if several is None and step.max() > 1:
                at = int(np.argmax(step > 1))
                several = f"document {first + at - 1} is sequences {begin[at] - step[at]} to {begin[at] - 1}"
        before = int(begin[-1])
    if before != count:
        _refuse(idx, "document index", last, before, f"{count}, the number of sequences")
    return several


def _refuse(idx: str, array: str, entry: int, found: int, expected: str) -> NoReturn:
    raise ValueError(
        f"{idx} is damaged: entry {entry} of its {array}, counted from 0, is {found}, expected {expected}; {_REMEDY}"
    )


def sample_pieces(
    document_index: np.ndarray,
    sample_index: np.ndarray,
    lengths: np.ndarray,
    sample: int,
    seq_length: int,
    extra_token: int = 1,
) -> tuple[np.ndarray, bool]:
    """Boundaries of the pieces in one packed sample.

    Args:
        document_index: int32[epochs * documents], documents in packed order.
        sample_index: int[samples + 1, 2], (position in document_index, token offset) where each sample starts.
        lengths: int32[documents], tokens per document.
        sample: the sample, after the shuffle index.
        seq_length: input tokens S.
        extra_token: 1 when the sample holds one more token for the last label, else 0.

    Returns:
        (cu_seqlens int64[pieces + 1] from 0 to S, continues): `continues` says that the last label belongs to the last piece. A
        sample shorter than S (the last one of a validation split) is padded: its inputs reach to the stream's last token, and
        the padding is folded into the last piece, its targets masked.
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
        document_index, sample_index, lengths, seq_length: as for `sample_pieces`.
        chunk: documents held at once.
    """
    if int(document_index.max(initial=0)) >= len(lengths):
        return 0
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
        document_index, sample_index, lengths, extra_token: as for `sample_pieces`.
        least: tokens, 1..S - 1.
        chunk: samples held at once.

    Returns:
        bool[samples], in packed order.
    """
    reach = np.zeros(len(sample_index) - 1, bool)
    for start in range(0, len(reach), chunk):
        index = np.array(sample_index[start : start + chunk + 1], np.int64)
        first, last, end = index[:-1, 0], index[1:, 0], index[1:, 1]
        low = int(first[0])
        size = lengths.take(document_index[low : int(last[-1]) + 1])
        # A piece of length L reaches L - 1, and L if its document goes on.
        found = np.where(first == last, True, (size[first - low] - index[:-1, 1] > least) | (end + extra_token > least))
        whole = low + np.flatnonzero(size > least)  # documents, of which those matter that lie inside a sample
        sample = np.searchsorted(first, whole) - 1
        found[sample[(sample >= 0) & (last[sample] > whole)]] = True
        reach[start : start + chunk] = found
    return reach


@dataclass
class PieceHistogram:
    """Pieces by length, over a set of samples.

    Attributes:
        ended: int64[S + 1], pieces whose last target is the next document's first token.
        continued: int64[S + 1], pieces whose document goes on in the next sample.
        closing: samples that end together with a document, which is counted in `ended`.
    """

    ended: np.ndarray
    continued: np.ndarray
    closing: int


def _chunks(lengths: np.ndarray, document_index: np.ndarray | None, chunk: int) -> Iterator[np.ndarray]:
    """Yield document lengths in packed order, at most `chunk` at a time."""
    total = len(lengths) if document_index is None else len(document_index)
    for start in range(0, total, chunk):
        part = slice(start, start + chunk)
        yield lengths[part] if document_index is None else lengths.take(document_index[part])


def stream_tokens(lengths: np.ndarray, document_index: np.ndarray | None = None, chunk: int = 1 << 19) -> int:
    """Tokens of the packed stream."""
    return sum(int(part.sum(dtype=np.int64)) for part in _chunks(lengths, document_index, chunk))


def piece_histogram(
    lengths: np.ndarray,
    seq_length: int,
    *,
    samples: int,
    document_index: np.ndarray | None = None,
    chosen: np.ndarray | None = None,
    chunk: int = 1 << 19,
) -> PieceHistogram:
    """Histogram the pieces of the first `samples` samples in one pass over the documents.

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
        final = (rest <= s) & (boundary < stream_end)  # the document's last piece follows this boundary
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
    ended[0] = 0  # empty documents have no piece
    return PieceHistogram(ended, continued, closing)
