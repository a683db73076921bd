"""Turn text into Megatron's ``PREFIX.bin`` and ``.idx``: one sequence per document, an EOD token after each.

Shards of about ``shard_bytes`` of input are tokenized by worker processes, written to ``PREFIX.parts/`` and
joined in order, so the output depends neither on the number of workers nor on interruptions: a rerun with the
same settings skips the finished shards. ``PREFIX.idx`` appears last, by a rename.

A hash of seed and document name (``folder/file.py``, ``file.jsonl:17``) picks the held-out documents.
Files with a NUL byte ("binary") and documents of white space only ("empty") are left out, undecodable bytes
become U+FFFD ("replaced"); all are counted. A special token spelled out in a text is tokenized as plain text.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .corpus import GLOBS, Shard, cut_shards, list_files, read_documents, stable_hash
from .tokenizer import EOD, find_eod, load_tokenizer, read_json, tokenizer_file, train_bpe, write_json

FORMAT = 1
SPLITS = ("", "_valid")
COUNTED = ("empty", "binary", "replaced", "eod_in_text")
_Tokens = tuple[np.ndarray, np.ndarray, dict[str, int]]


class _Job(NamedTuple):
    """What a worker has to know."""

    tokenizer: str
    eod: int
    dtype: str
    text_key: str
    valid_fraction: float
    seed: int

    def is_valid(self, name: str) -> bool:
        return stable_hash("valid", self.seed, name) < self.valid_fraction * 2**64


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _say(message: str) -> None:
    print(f"prepare: {message}", file=sys.stderr, flush=True)


_worker: tuple[Any, _Job]


def _start_worker(job: _Job) -> None:
    """Runs once in each worker and loads the tokenizer there, so forked and spawned workers are alike."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent: Any = multiprocessing.parent_process()  # if it is killed, the workers go too
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _worker = (load_tokenizer(Path(job.tokenizer)), job)


def _encode_shard(shard: Shard) -> list[_Tokens]:
    """For each of SPLITS: tokens [T], EODs included; document lengths int64[D], which sum to T; counts."""
    tokenizer, job = _worker
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    documents: list[list[np.ndarray]] = [[], []]
    counts = [Counter(dict.fromkeys(COUNTED, 0)) for _ in SPLITS]
    for name, text, note in read_documents(shard, job.text_key):
        split = int(job.is_valid(name))
        ids = encode([text], add_special_tokens=False)[0].ids if text.strip() else []
        if ids:
            documents[split].append(np.array([*ids, job.eod], dtype=job.dtype))
            counts[split].update(replaced=int(note == "replaced"), eod_in_text=int(job.eod in ids))
        else:
            counts[split]["binary" if note == "binary" else "empty"] += 1
    results: list[_Tokens] = []
    for arrays, count in zip(documents, counts, strict=True):
        tokens = np.concatenate([np.empty(0, job.dtype), *arrays])
        count.update(bytes=tokens.nbytes, max_token_id=int(tokens.max(initial=0)))
        results.append((tokens, np.array([len(array) for array in arrays], dtype=np.int64), dict(count)))
    return results


def _write_part(parts: Path, index: int, results: list[_Tokens]) -> None:
    """Write one shard. Its .json comes last, by a rename: only with it is the shard finished."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for split, (tokens, lengths, _) in zip(SPLITS, results, strict=True):
        if len(lengths):
            builder = IndexedDatasetBuilder(f"{parts}/{index}{split}.bin", dtype=tokens.dtype.type)
            for end, length in zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True):
                builder.add_document(tokens[end - length : end], [length])
            builder.finalize(f"{parts}/{index}{split}.idx")
    write_json(parts / f"{index}.json", [counts for _, _, counts in results])


def _encode_all(shards: Iterator[Shard], parts: Path, pool: Any, ahead: int, total: int, quiet: bool) -> int:
    """Tokenize the unfinished shards, ``ahead`` at a time, into ``parts``; returns the number of all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    last, count, reused = time.monotonic(), 0, 0
    pending: deque[tuple[int, int, Any]] = deque()
    columns = ("tokenizing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty())
    task = bar.add_task("", total=total)
    pool.submit(os.getpid).result()  # a forking pool forks now, before the bar starts its thread
    with bar:
        for shard in itertools.chain(shards, [None]):
            if shard and (parts / f"{shard.number}.json").exists():
                bar.advance(task, shard.cost)
                reused += 1
            elif shard:
                pending.append((shard.number, shard.cost, pool.submit(_encode_shard, shard)))
            count += shard is not None
            while pending and (shard is None or len(pending) > ahead):
                index, cost, future = pending.popleft()
                _write_part(parts, index, future.result())
                bar.advance(task, cost)
                if bar.disable and not quiet and time.monotonic() - last >= 10:
                    last = time.monotonic()
                    _say(f"{bar.tasks[0].completed / 1e6:.0f} of {total / 1e6:.0f} MB of input")
    if reused and not quiet:
        _say(f"{reused} of {count} shards were finished by an earlier run")
    return count


def _join_parts(parts: Path, shards: int, split: str, dtype: type) -> dict[str, Any]:
    """Join one split's parts into ``parts``/joined.bin and .idx; returns its counts or raises ValueError."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder, total, top = IndexedDatasetBuilder(f"{parts}/joined{split}.bin", dtype=dtype), Counter[str](), 0
    gc.freeze()  # add_index collects garbage each time: let it not walk through all of torch
    for index in range(shards):
        record = read_json(parts / f"{index}.json")[SPLITS.index(split)]
        top = max(top, record.pop("max_token_id"))
        total.update(record)
        if record["bytes"]:
            builder.add_index(f"{parts}/{index}{split}")
    gc.unfreeze()
    lengths = np.array(builder.sequence_lengths, dtype=np.int64)
    if not lengths.size:
        left_out = ", ".join(f"{total[key]} {key}" for key in ("empty", "binary"))
        raise ValueError(f"no document in the {'held-out' if split else 'training'} split ({left_out})")
    builder.finalize(f"{parts}/joined{split}.idx")
    size = os.path.getsize(f"{parts}/joined{split}.bin")
    if not lengths.sum() * np.dtype(dtype).itemsize == size == total["bytes"]:
        raise ValueError(f"{parts} is damaged ({size} bytes, not {total['bytes']}): delete it, run again")
    counts = {"documents": lengths.size, "tokens": int(lengths.sum()), "longest_document": int(lengths.max())}
    counts |= {f"length_p{q}": int(np.percentile(lengths, q, method="nearest")) for q in (50, 90, 99)}
    return counts | {"max_token_id": top, "bytes": size} | {f"{key}_documents": total[key] for key in COUNTED}


def _is_current(prefix: Path, splits: Sequence[str], digest: str) -> bool:
    """Whether PREFIX is whole, was made from these settings, and its tokenizer is unchanged."""
    for path in (f"{prefix}{split}" for split in splits):
        meta = read_json(f"{path}.json")
        if meta.get("settings") != digest or not os.path.exists(f"{path}.idx"):
            return False
        tokenizer = tokenizer_file(prefix.parent / meta["tokenizer"])
        if not tokenizer.exists() or _sha256(tokenizer) != meta["tokenizer_sha256"]:
            return False
        if not os.path.exists(f"{path}.bin") or os.path.getsize(f"{path}.bin") != meta["bytes"]:
            return False
    return True


def prepare(
    inputs: Sequence[str],
    output: str,
    *,
    train_tokenizer: int | None = None,
    tokenizer: str | None = None,
    eod: str | None = None,
    text_key: str = "text",
    globs: Sequence[str] | None = None,
    valid_fraction: float = 0.0,
    seed: int = 0,
    tokenizer_bytes: int = 32 << 20,
    shard_bytes: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    start_method: str | None = None,
) -> dict[str, Any]:
    """Write ``output``.bin/.idx/.json, and ``output``_valid.* if valid_fraction > 0; returns the first .json.

    Give one of ``train_tokenizer`` (vocabulary size) and ``tokenizer`` (folder or tokenizer.json). A dataset
    that is there, made from the same settings and files, is left alone. Lengths are in tokens, EOD included.
    Raises ValueError or OSError with a message for the user.
    """
    if (train_tokenizer is None) == (tokenizer is None):
        raise ValueError("give either a vocabulary size to train a tokenizer or an existing tokenizer")
    if train_tokenizer is not None and (train_tokenizer < 257 or eod is not None):
        raise ValueError(f"a trained tokenizer has 257 entries or more, not {train_tokenizer}, and EOD {EOD}")
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"valid_fraction {valid_fraction} is not in [0, 1)")
    files = list_files(inputs := [str(source) for source in inputs], globs or GLOBS.split())
    size = sum(file.size for file in files)
    shard_bytes = shard_bytes or min(max(size // 256, 1 << 20), 32 << 20)
    prefix, parts = Path(output).absolute(), Path(f"{output}.parts").absolute()
    splits = SPLITS if valid_fraction else SPLITS[:1]
    file = parts / "tokenizer" / "tokenizer.json"
    origin: list[Any] = [train_tokenizer, tokenizer_bytes]
    if tokenizer is not None:
        file = tokenizer_file(tokenizer).absolute()
        origin = [*find_eod(load_tokenizer(file), file, eod), _sha256(file)]
    facts = [FORMAT, [f[:1] + f[2:] for f in files], origin, text_key, valid_fraction, seed, shard_bytes]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if not overwrite and _is_current(prefix, splits, digest):
        if not quiet:
            _say(f"{output} is up to date")
        return read_json(f"{prefix}.json")
    resumed = read_json(parts / "settings.json") == digest
    existing = [Path(f"{prefix}{split}.{end}") for split in SPLITS for end in ("idx", "json", "bin")]
    existing = [path for path in existing if path.exists()]
    if existing and not (overwrite or resumed):
        raise FileExistsError(f"{existing[0]} exists, with other settings or inputs; --overwrite replaces it")

    from megatron.core.datasets.indexed_dataset import DType

    import exact_megatron

    parts.mkdir(parents=True, exist_ok=True)
    with open(parts / "lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise FileExistsError(f"another process is working in {parts}") from None
        if not resumed:
            if (parts / "settings.json").exists() and not quiet:
                _say(f"discarding {parts}: it holds an unfinished run with other settings or inputs")
            for path in [path for path in parts.iterdir() if path.name != "lock"]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_json(parts / "settings.json", digest)
        job, final = _Job(str(file), 0, "", text_key, valid_fraction, seed), file
        if tokenizer is None:
            if not file.exists():
                assert train_tokenizer is not None
                train_bpe(
                    files,
                    file.parent,
                    train_tokenizer,
                    tokenizer_bytes,
                    seed,
                    text_key,
                    lambda name: not job.is_valid(name),
                )
            final = prefix.parent / "tokenizer" / "tokenizer.json"
            if final.exists() and not overwrite and _sha256(final) != _sha256(file):
                raise FileExistsError(f"{final} is another dataset's: change the folder or --overwrite")
        loaded, checksum = load_tokenizer(file), _sha256(file)
        token, number = find_eod(loaded, file, eod)
        vocab_size = max(loaded.get_vocab().values()) + 1
        dtype = DType.optimal_dtype(vocab_size)
        job = job._replace(eod=number, dtype=dtype.__name__)
        workers = workers or len(os.sched_getaffinity(0))
        context = multiprocessing.get_context(start_method)
        pool = ProcessPoolExecutor(workers, context, _start_worker, (job,))
        try:
            shards = _encode_all(cut_shards(files, shard_bytes), parts, pool, workers + 1, size, quiet)
        finally:
            pool.shutdown(cancel_futures=True)
        shown = final.parent if final.name == "tokenizer.json" else final
        made = {
            "format": FORMAT,
            "exact_megatron": getattr(exact_megatron, "__version__", None),
            "settings": digest,
            "sources": inputs,
            "valid_fraction": valid_fraction,
            "seed": seed,
            "tokenizer": os.path.relpath(shown, prefix.parent),
            "tokenizer_sha256": checksum,
            "eod_token": token,
            "eod_id": number,
            "dtype": dtype.__name__,
            "vocab_size": vocab_size,
        }
        metas = [{"split": s[1:] or "train"} | made | _join_parts(parts, shards, s, dtype) for s in splits]

        for path in existing:
            path.unlink(missing_ok=True)
        if tokenizer is None:
            final.parent.mkdir(exist_ok=True)
            for name in ("tokenizer_config.json", "tokenizer.json"):
                os.replace(file.with_name(name), final.with_name(name))
        for split, meta in zip(splits, metas, strict=True):
            os.replace(parts / f"joined{split}.bin", f"{prefix}{split}.bin")
            write_json(f"{prefix}{split}.json", meta)
        for split in reversed(splits):
            os.replace(parts / f"joined{split}.idx", f"{prefix}{split}.idx")
        shutil.rmtree(parts)
    return metas[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``exact-megatron prepare``."""
    add, which = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    add("inputs", nargs="+", help="text file, folder, .jsonl[.gz|.zst], or stdlib: Python's own library")
    add("--output", required=True, metavar="PREFIX", help="write PREFIX.bin, PREFIX.idx and PREFIX.json")
    which.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json, or a folder that holds one")
    text = "train a byte-level BPE of this size and save it in tokenizer/ beside PREFIX"
    which.add_argument("--train-tokenizer", type=int, metavar="VOCAB_SIZE", help=text)
    add("--tokenizer-bytes", type=int, default=32 << 20, help="text to train on (default: %(default)s)")
    add("--eod", metavar="TOKEN", help="end of document (default: eos_token of tokenizer_config.json)")
    add("--text-key", default="text", help="key of the text in a JSONL line (default: %(default)s)")
    add("--glob", action="append", dest="globs", help=f"files of a folder, repeatable (default: {GLOBS})")
    add("--valid-fraction", type=float, default=0.0, help="share of documents held out in PREFIX_valid")
    add("--seed", type=int, default=0, help="picks held-out documents and the sample for the tokenizer")
    add("--workers", type=int, help="processes (default: the CPUs at hand); the output does not depend on it")
    add("--shard-bytes", type=int, help="input per unit of work and resume (default: 1 to 32 MiB, by size)")
    add("--overwrite", action="store_true", help="replace PREFIX, even if it is up to date")


def run(args: argparse.Namespace) -> int:
    """Run ``exact-megatron prepare``: 0 done or up to date, 2 an error (printed), 130 interrupted."""
    from rich.console import Console
    from rich.table import Table

    options = {key: value for key, value in vars(args).items() if key in (prepare.__kwdefaults__ or ())}
    try:
        metas = [prepare(args.inputs, args.output, **options)]
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from the finished shards")
        return 130
    except (OSError, ValueError, BrokenProcessPool) as error:  # the last: a worker was killed, for memory say
        if getattr(args, "traceback", False):
            raise
        _say(f"error: {error}")
        return 2
    metas += [read_json(f"{args.output}_valid.json")] if args.valid_fraction else []
    table = Table(args.output, *(meta["split"] for meta in metas))
    shown = itertools.dropwhile(lambda key: key != "dtype", metas[0])  # from there on facts and counts
    for key in shown:
        table.add_row(key, *(f"{v:,}" if isinstance(v := meta[key], int) else str(v) for meta in metas))
    Console().print(table)
    return 0
