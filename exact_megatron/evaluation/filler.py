"""Real text as token ids, in which the distance probe hides its evidence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..packing import read_index
from ..prepare.files import list_files
from ..prepare.shards import cut_shards, read_documents
from ..utils.files import read_json
from .model import Text
from .store import digest

TEXT_BYTES = 8 << 20  # of a text source that are tokenized, at most


class Filler:
    """Documents as ids; `window` cuts stretches of tokens out of them.

    Attributes:
        documents: number of documents.
        digest: changes with the documents.
    """

    def __init__(self, lengths: np.ndarray, read: Callable[[int], np.ndarray], digest: str) -> None:
        self.documents = len(lengths)
        self._lengths = lengths
        self._read = read
        self.digest = digest

    def window(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """int64[length] from one document where that is long enough, else from several, one after the other.

        Raises:
            ValueError: all documents together are shorter.
        """
        long_enough = np.flatnonzero(self._lengths >= length)
        if len(long_enough):
            ids = self._read(int(rng.choice(long_enough)))
            start = int(rng.integers(len(ids) - length + 1))
            return ids[start : start + length]
        parts = []
        total = 0
        for number in rng.permutation(self.documents):
            parts.append(self._read(int(number)))
            total += len(parts[-1])
            if total >= length:
                return np.concatenate(parts)[:length]
        raise ValueError(
            f"the filler has {total} tokens, the probe needs {length} in a row: give more text with --filler"
        )


def open_filler(source: str, text: Text, vocab_size: int) -> Filler:
    """Filler from a .bin/.idx prefix, a text file or folder, or "stdlib": Python's own library.

    Raises:
        FileNotFoundError, ValueError: see corpus.list_files and packing.read_index; or a prefix that another tokenizer made.
    """
    if Path(f"{source}.idx").is_file() or source.endswith((".bin", ".idx")):
        return _from_prefix(source, vocab_size)
    documents = []
    names = []
    size = 0
    for shard in cut_shards(list_files([source])[0], 1 << 20):
        for name, content, _, left_out in read_documents(shard, "text"):
            if left_out is None and size < TEXT_BYTES:
                documents.append(np.array(text.encode(content), np.int64))
                names.append([name, len(content)])
                size += len(content)
    found = digest(names, text.digest, *documents)
    return Filler(np.array([len(d) for d in documents]), documents.__getitem__, found)


def _from_prefix(prefix: str, vocab_size: int) -> Filler:
    index = read_index(prefix)
    tokens = np.memmap(index.prefix + ".bin", dtype=index.dtype, mode="r")
    if (largest := int(tokens[: 1 << 24].max())) >= vocab_size:
        raise ValueError(
            f"{index.prefix}.bin holds token id {largest}, the model has 0..{vocab_size - 1}: another tokenizer made it"
        )
    ends = np.cumsum(index.lengths, dtype=np.int64)
    starts = ends - index.lengths
    eod = read_json(f"{index.prefix}.json").get("eod_id")
    closed = (index.lengths > 0) & (tokens[ends - 1] == eod) if eod is not None else np.zeros(len(ends), bool)
    lengths = index.lengths - closed  # an end of document in the filler would tell the model to forget

    def read(number: int) -> np.ndarray:
        return tokens[starts[number] : starts[number] + lengths[number]].astype(np.int64)

    return Filler(lengths, read, digest(np.asarray(index.lengths), bytes(tokens[: 1 << 20].tobytes()), len(tokens)))
