"""A byte-level BPE of one's own, or a given tokenizer.json: training, special tokens, identity."""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..utils.files import write_json, writing
from ..utils.tokenizer import EOD
from .files import File
from .shards import cut_shards, read_documents, stable_hash

LONG_WORD = re.compile(r"\S{200}(?=\S)")  # cut for training: the trainer is quadratic in a word's length


def train_bpe(
    files: Sequence[File],
    folder: Path,
    size: int,
    sample_bytes: int,
    seed: int,
    text_key: str,
    keep: Callable[[str], bool],
) -> None:
    """Train a byte-level BPE of ``size`` entries into ``folder``, on documents whose name ``keep`` accepts.

    The sample is the ``sample_bytes`` of text that come first when documents are ordered by hash.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    sample: list[tuple[int, str, str, int]] = []  # a heap, the last document of the order on top
    total = 0
    limit = 2**64

    def want(name: str) -> bool:
        return stable_hash("sample", seed, name) < limit and keep(name)

    for shard in cut_shards(files, 1 << 20, text_key):
        for name, text, *_ in read_documents(shard, text_key, want):
            length = len(text.encode()) if text.strip() else 0
            heapq.heappush(sample, (-stable_hash("sample", seed, name), name, text, length))
            total += length
            while total - sample[0][3] >= sample_bytes:
                total -= heapq.heappop(sample)[3]
            limit = -sample[0][0] if total >= sample_bytes else limit
    texts = [text for _, _, text, _ in sorted(sample, reverse=True)]
    if not total:
        raise ValueError("there is no text to train a tokenizer on")
    if total > sample_bytes:
        texts[-1] = texts[-1].encode()[: sample_bytes - total].decode(errors="ignore")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {"special_tokens": [EOD], "initial_alphabet": alphabet, "show_progress": False}
    texts = [LONG_WORD.sub(r"\g<0>\n", text) for text in texts]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **options))
    folder.mkdir(exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD}
    write_json(folder / "tokenizer_config.json", config | {"clean_up_tokenization_spaces": False})
    with writing(folder / "tmp"):
        tokenizer.save(str(folder / "tmp"))
    os.replace(folder / "tmp", folder / "tokenizer.json")
