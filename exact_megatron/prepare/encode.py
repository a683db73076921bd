"""Shards of text tokenized by worker processes, written one by one, and joined in order.

A part is named by a digest of its text and of the settings that its tokens depend on: a rerun makes those that are missing, whatever
else has changed.
"""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..utils.files import read_json, write_json, writing
from ..utils.tokenizer import load_tokenizer
from .files import LeftOut, merge_left_out
from .shards import Shard, read_documents, stable_hash

FORMAT = 2
SPLITS = ("", "_valid")
COUNTED = ("empty", "binary", "replaced", "eod_in_text")
_Tokens = tuple[np.ndarray, np.ndarray, dict[str, int]]


class Job(NamedTuple):
    """What a worker has to know; all but the tokenizer's path is in a part's name."""

    tokenizer: str
    checksum: str
    before: list[int]
    after: list[int]
    eod: int
    dtype: str
    text_key: str
    valid_fraction: float
    seed: int
    format: int = FORMAT

    def is_valid(self, name: str) -> bool:
        return stable_hash("valid", self.seed, name) < self.valid_fraction * 2**64


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def say(message: str) -> None:
    print(f"prepare: {message}", file=sys.stderr, flush=True)


_worker: tuple[Any, Job]


def start_worker(job: Job) -> None:
    """Runs once in each worker and loads the tokenizer there, so forked and spawned workers are alike."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent: Any = multiprocessing.parent_process()  # if it is killed, the workers go too
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _worker = (load_tokenizer(Path(job.tokenizer)), job)


def _encode_shard(shard: Shard) -> tuple[list[_Tokens], list[LeftOut]]:
    """For each of SPLITS: tokens [T], EODs included; document lengths int64[D], which sum to T; counts. And what is
    left out."""
    tokenizer, job = _worker
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    documents: list[list[np.ndarray]] = [[], []]
    counts = [Counter(dict.fromkeys(COUNTED, 0)) for _ in SPLITS]
    left: list[LeftOut] = []
    for name, text, note, reason in read_documents(shard, job.text_key):
        split = int(job.is_valid(name))
        ids = encode([text], add_special_tokens=False)[0].ids if reason is None else []
        if ids:
            ids = [*job.before, *ids, *job.after]
            counts[split].update(replaced=int(note == "replaced"), eod_in_text=int(job.eod in ids))
            documents[split].append(np.array([*ids, job.eod], dtype=job.dtype))
        else:
            counts[split]["binary" if note == "binary" else "empty"] += 1
            no_token = "the tokenizer has no token for its text"
            record = shard.data is not None
            left.append(reason or LeftOut(shard.files[0].path if record else name, no_token, 1, name if record else ""))
    results: list[_Tokens] = []
    for arrays, count in zip(documents, counts, strict=True):
        tokens = np.concatenate([np.empty(0, job.dtype), *arrays])
        count.update(bytes=tokens.nbytes, max_token_id=int(tokens.max(initial=0)))
        results.append((tokens, np.array([len(array) for array in arrays], dtype=np.int64), dict(count)))
    return results, merge_left_out(left)


def write_part(parts: Path, name: str, results: list[_Tokens], left: list[LeftOut]) -> None:
    """Write one shard; an OSError names the file. Its .json comes last, by a rename: only with it is the shard finished."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for split, (tokens, lengths, _) in zip(SPLITS, results, strict=True):
        if len(lengths):
            with writing(path := f"{parts}/{name}{split}.bin"):
                builder = IndexedDatasetBuilder(path, dtype=tokens.dtype.type)
                for end, length in zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True):
                    builder.add_document(tokens[end - length : end], [length])
                builder.finalize(f"{parts}/{name}{split}.idx")
    write_json(parts / f"{name}.json", {"splits": [counts for _, _, counts in results], "left_out": left})


def encode_all(
    shards: Iterator[Shard], parts: Path, job: Job, pool: Any, ahead: int, total: int, quiet: bool
) -> list[str]:
    """Tokenize the unfinished shards, ``ahead`` at a time, into ``parts``; returns the names of all, in order.

    What fails ends the run after the shards that are under way are written."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    last = time.monotonic()
    reused = 0
    names: dict[str, None] = {}
    order: list[str] = []
    failed: list[Exception] = []
    pending: deque[tuple[str, int, Any]] = deque()
    columns = ("tokenizing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty())
    task = bar.add_task("", total=total)
    pool.submit(os.getpid).result()  # a forking pool forks now, before the bar starts its thread

    def write_first() -> None:
        nonlocal last
        name, cost, future = pending.popleft()
        try:
            write_part(parts, name, *future.result())
        except Exception as error:
            failed.append(error)
        bar.advance(task, cost)
        if bar.disable and not quiet and time.monotonic() - last >= 10:
            last = time.monotonic()
            say(f"{bar.tasks[0].completed / 1e6:.0f} of {total / 1e6:.0f} MB of input")

    with bar:
        try:
            for shard in shards:
                name = shard.digest(*job[1:])
                order.append(name)
                if name in names:  # the same file, named twice
                    bar.advance(task, shard.cost)
                elif (parts / f"{name}.json").exists():
                    bar.advance(task, shard.cost)
                    reused += 1
                else:
                    pending.append((name, shard.cost, pool.submit(_encode_shard, shard)))
                names[name] = None
                if len(pending) > ahead:
                    write_first()
                if failed:
                    break
        except (ValueError, OSError) as error:  # a file that cannot be read further
            failed.append(error)
        while pending:
            write_first()
    if reused and not quiet:
        say(f"{reused} of {len(order)} shards were finished by an earlier run")
    if failed:
        raise failed[0]
    return order


def read_made(path: str | Path, remedy: str) -> dict[str, Any]:
    """A file that `prepare` wrote, {} where there is none; ValueError with the remedy where it is damaged."""
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None


def read_part(parts: Path, name: str) -> dict[str, Any]:
    """What `write_part` says of a finished shard."""
    return read_made(parts / f"{name}.json", f"remove {parts} and run again")


def join_parts(parts: Path, names: Sequence[str], split: str, dtype: type, left: Sequence[str]) -> dict[str, Any]:
    """Join one split's parts into ``parts``/joined.bin and .idx; returns its counts or raises ValueError."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    joined = f"{parts}/joined{split}"
    total = Counter[str]()
    top = 0
    gc.freeze()  # add_index collects garbage each time: let it not walk through all of torch
    with writing(f"{joined}.bin"):
        builder = IndexedDatasetBuilder(f"{joined}.bin", dtype=dtype)
        for name in names:
            record = read_part(parts, name)["splits"][SPLITS.index(split)]
            top = max(top, record.pop("max_token_id"))
            total.update(record)
            if record["bytes"]:
                builder.add_index(f"{parts}/{name}{split}")
    gc.unfreeze()
    lengths = np.array(builder.sequence_lengths, dtype=np.int64)
    if not lengths.size:
        found = ", ".join(f"{total[key]} {key}" for key in ("empty", "binary"))
        reasons = "".join(f"; {line}" for line in left[:3])
        raise ValueError(f"no document in the {'held-out' if split else 'training'} split ({found}){reasons}")
    with writing(f"{joined}.idx"):
        builder.finalize(f"{joined}.idx")
    size = os.path.getsize(f"{joined}.bin")
    if not lengths.sum() * np.dtype(dtype).itemsize == size == total["bytes"]:
        raise ValueError(f"{parts} is damaged ({size} bytes, not {total['bytes']}): delete it, run again")
    counts = {"documents": lengths.size, "tokens": int(lengths.sum()), "longest_document": int(lengths.max())}
    counts |= {f"length_p{q}": int(np.percentile(lengths, q, method="nearest")) for q in (50, 90, 99)}
    return counts | {"max_token_id": top, "bytes": size} | {f"{key}_documents": total[key] for key in COUNTED}
